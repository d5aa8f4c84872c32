"""What a library's models must offer so that `HookedModel` can wrap them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from interp_hooks.activations import Hook, Residual
from interp_hooks.call import Site
from interp_hooks.engine import Tap
from interp_hooks.errors import TapError
from interp_hooks.head_weights import HeadWeights
from interp_hooks.norms import Norms
from interp_hooks.vocabulary import Embeddings
from interp_hooks.wrapping import device_of


class Adapter(ABC):
    """One library's way in. `module` is the library's model, `sites` its attentions in order."""

    module: Any
    sites: list[Site]
    max_context: int | None
    #: keyword arguments of the model's forward that `HookedModel` passes on
    accepts: frozenset[str]

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong."""
        return device_of(self.module)

    @property
    def has_cache(self) -> bool:
        """Whether forwards can return and take `past_key_values`."""
        return "past_key_values" in self.accepts and not self.accepts.isdisjoint(
            ("use_cache", "kwargs")
        )

    @property
    def position_table(self) -> str | None:
        """The path of the embedding of learned positions; None in models without one."""
        return None

    def anchors(self) -> Sequence[tuple[torch.nn.Module, Hashable]]:
        """The modules by which other handles on the same model are known, and what each is called:
        handles that agree share their blocks."""
        return [(self.module, None)]

    @contextmanager
    def outputs(self) -> Iterator[dict[Site, torch.Tensor]]:
        """site → what its attention layer gives in a forward of the block, where that can be held
        against its heads; empty where the library vouches for its weights."""
        yield {}

    def compare_output(self, site: Site, z: torch.Tensor, out: torch.Tensor, most: float) -> None:
        """Note where Σ_h z_h W_O,h + b_O differs from a layer's output by more than `most` of its
        size: its head weights are then refused."""
        return

    @abstractmethod
    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the model; `input_ids` and `attention_mask` (batch, tokens) are understood by all."""

    @abstractmethod
    def generate(self, **inputs: Any) -> torch.Tensor:
        """Generate tokens."""

    @abstractmethod
    def installed(self, tap: Tap) -> AbstractContextManager[None]:
        """Route attention through the tap's observers and edits, as they are at each call, while
        the block lasts."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is run in this block leaves no trace in what the tap knows of the prompt at hand."""
        yield

    @abstractmethod
    def residual(self, write: Hook | None, keep: bool = True) -> AbstractContextManager[Residual]:
        """Record (unless not to be kept) and rewrite the residual stream of the main tower while
        the block lasts."""

    #: whether calls carry queries and keys; where not, `projections` shows them
    calls_have_queries = True

    @abstractmethod
    def projections(self, hook: Hook) -> AbstractContextManager[None]:
        """Let `hook` look at and replace q, k and v as the projections give them, before
        rotation."""

    @abstractmethod
    def blocks(self) -> dict[int, torch.nn.Module]:
        """The transformer block of each layer of the main tower."""

    @abstractmethod
    def head_weights(self, site: Site) -> HeadWeights:
        """Per-head weights at a site."""

    def output_projection(self, site: Site) -> torch.nn.Module:
        """The module that is W_O of a site. Raises `TapError` where none is known."""
        raise TapError("Modules of this library's models are not known by what they do.")

    @abstractmethod
    def embeddings(self) -> Embeddings:
        """The main tower's embedding and unembedding as they are stored. Raises `TapError` where it
        has none."""

    @abstractmethod
    def norms(self, ids: torch.Tensor) -> Norms:
        """The main tower's norms, found in a forward of `ids` where they are not known by name."""

    @abstractmethod
    def ordinary(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids` without tokens that stand for something else, an image's."""

    @abstractmethod
    def explain(self, tap: Tap, tokens: int) -> str:
        """A line for neighbouring layers that go the same way: what the edits do, which kernels
        run, and why."""
