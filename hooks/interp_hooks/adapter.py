"""What a library's models must offer so that `HookedModel` can wrap them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from interp_hooks.activations import Rewrite
from interp_hooks.call import Site
from interp_hooks.edit import Edit
from interp_hooks.huggingface.residual import Residual, Write
from interp_hooks.norms import Norms
from interp_hooks.vocabulary import Embeddings
from interp_hooks.weights import HeadWeights

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel


class Adapter(ABC):
    """One library's way in. `module` is the library's model, `sites` its attentions in order."""

    module: Any
    sites: list[Site]
    max_context: int | None
    #: keyword arguments of the model's forward that `HookedModel` passes on
    accepts: frozenset[str]

    @abstractmethod
    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the model; `input_ids` and `attention_mask` (batch, tokens) are understood by all."""

    @abstractmethod
    def generate(self, **inputs: Any) -> torch.Tensor:
        """Generate tokens."""

    @abstractmethod
    def installed(self, model: HookedModel) -> AbstractContextManager[None]:
        """Route attention through the model's observers and edits while the block lasts."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is run in this block leaves no trace in what the tap knows of the prompt at hand."""
        yield

    @abstractmethod
    def residual(self, write: Write | None, keep: bool = True) -> AbstractContextManager[Residual]:
        """Record (unless not to be kept) and rewrite the residual stream of the main tower while
        the block lasts."""

    #: whether calls carry queries and keys; where not, `projections` shows them
    calls_have_queries = True

    @abstractmethod
    def projections(self, see: Rewrite) -> AbstractContextManager[None]:
        """Let `see` look at and replace q, k and v as the projections give them, before
        rotation."""

    @abstractmethod
    def blocks(self) -> dict[int, torch.nn.Module]:
        """The transformer block of each layer of the main tower."""

    @abstractmethod
    def head_weights(self, site: Site) -> HeadWeights:
        """Per-head weights at a site."""

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
    def explain(self, model: HookedModel, edits: Sequence[Edit], tokens: int) -> str:
        """A line for neighbouring layers that go the same way: what the edits do, which kernels
        run, and why."""
