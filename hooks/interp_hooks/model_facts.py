"""What a model is: its attentions, their sizes, and the heads it has."""

from __future__ import annotations

from typing import Any

import torch

from interp_hooks.adapter import Adapter
from interp_hooks.call import Site
from interp_hooks.errors import HeadError
from interp_hooks.heads import CROSS, Head, check_layer_head


class ModelFacts:
    """What can be told of a model without running it; `HookedModel` is what can be done with it.

    Example:
        >>> from interp_hooks.model_facts import ModelFacts
        >>> isinstance(model, ModelFacts), model.towers
        (True, [''])
    """

    name: str
    _adapter: Adapter

    @property
    def module(self) -> Any:
        """The wrapped model."""
        return self._adapter.module

    @property
    def sites(self) -> list[Site]:
        """Every attention of the model, in order."""
        return self._adapter.sites

    @property
    def towers(self) -> list[str]:
        """Names of the towers, in order; [""] where there is only one."""
        return list(dict.fromkeys(s.tower for s in self.sites))

    @property
    def main_tower(self) -> str:
        """The tower that a layer number alone means."""
        return "" if "" in self.towers else "text" if "text" in self.towers else self.towers[0]

    def _main(self) -> list[Site]:
        return [s for s in self.sites if s.tower == self.main_tower and s.kind == "self"]

    @property
    def n_layers(self) -> int:
        """Layers of the main tower (hybrid models: the last attention layer's number plus one)."""
        return max(s.layer for s in self._main()) + 1

    @property
    def n_heads(self) -> int:
        """Query heads of a layer of the main tower (the most, where layers differ)."""
        return max(s.n_heads for s in self._main())

    @property
    def n_kv_heads(self) -> int:
        """KV heads of a layer of the main tower (the most, where layers differ)."""
        return max(s.n_kv_heads for s in self._main())

    @property
    def d_head(self) -> int:
        """Size of a head of the main tower."""
        return self._main()[0].d_head

    @property
    def max_context(self) -> int | None:
        """The model's position limit in tokens, None where it has none."""
        return self._adapter.max_context

    @property
    def accepts(self) -> frozenset[str]:
        """The keyword arguments that the model's forward takes."""
        return self._adapter.accepts

    @property
    def has_cache(self) -> bool:
        """Whether forwards can return and take `past_key_values`."""
        return self._adapter.has_cache

    @property
    def position_table(self) -> str | None:
        """The path of the embedding of learned positions; None in models without one."""
        return self._adapter.position_table

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong: its parameters' device, or the one that offloaded
        weights are brought to."""
        return self._adapter.device

    @property
    def heads(self) -> list[Head]:
        """All query heads of all self-attention layers.

        Example:
            >>> len(model.heads), model.heads[9]
            (32, L1H1)
        """
        return [
            Head(s.layer, h, s.tower)
            for s in self.sites
            if s.kind == "self"
            for h in range(s.n_heads)
        ]

    def check(self, head: Any) -> Head:
        """The head, if the model has it.

        Args:
            head: in any spelling.

        Raises:
            HeadError: no head, or one that the model has not.

        Example:
            >>> model.check("2.3")
            L2H3
        """
        head = Head.parse(head)
        crossing = {s.layer: s.n_heads for s in self.sites if s.kind == "cross"}
        if head.tower == CROSS and crossing and CROSS not in self.towers:
            check_layer_head(head, crossing, self.name)
            return head
        if head.tower and head.tower not in self.towers:
            towers = ", ".join(filter(None, self.towers)) or "only one, without a name"
            raise HeadError(f"{self.name} has no tower {head.tower!r}; it has {towers}.")
        tower = head.tower or self.main_tower
        sizes = {s.layer: s.n_heads for s in self.sites if s.tower == tower and s.kind == "self"}
        check_layer_head(head, sizes, self.name)
        return head
