"""The model in an engine, as edits see it: its sites, and which of its heads are this rank's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interp_hooks.call import Site
from interp_hooks.heads import Head, check_layer_head


@dataclass(frozen=True)
class ServedModel:
    """A model that an engine serves: layers of heads, and nothing to run.

    Attributes:
        name: the model's.
        layers: the numbers of the layers with attention.
        n_heads, n_kv_heads, d_head: of each of them, of the whole model or of one rank.
        tokenizer: the model's, where texts are to be found in prompts.

    Example:
        >>> model = ServedModel("tiny", tuple(range(4)), 8, 4, 32)
        >>> model.check(Head(3, 7)), len(model.sites)
        (L3H7, 4)
    """

    name: str
    layers: tuple[int, ...]
    n_heads: int
    n_kv_heads: int
    d_head: int
    tokenizer: Any = None

    @property
    def sites(self) -> list[Site]:
        """Where it attends, by layer."""
        return [self.site(layer) for layer in self.layers]

    def site(self, layer: int) -> Site:
        """One of them."""
        return Site("", layer, "self", f"layer {layer}", self.n_heads, self.n_kv_heads, self.d_head)

    def check(self, head: Head) -> Head:
        """The head. Raises `HeadError` where the model has not got it."""
        check_layer_head(head, dict.fromkeys(self.layers, self.n_heads), self.name)
        return head

    def rank(self, rank: int, size: int) -> ServedModel:
        """What one of `size` ranks holds: heads rank · n … (rank + 1) · n − 1 of each layer."""
        n, kv = self.n_heads // size, max(1, self.n_kv_heads // size)
        return ServedModel(f"rank {rank} of {self.name}", self.layers, n, kv, self.d_head)
