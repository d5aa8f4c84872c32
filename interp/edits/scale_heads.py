"""Multiply the output of heads by a gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.base import HeadEdit
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall


@dataclass(frozen=True, init=False)
class ScaleHeads(HeadEdit):
    """z_h ← γ_h · z_h before W_O, for the heads named.

    Args:
        gains: head → γ, heads in any spelling, e.g. ``{"L5H1": 0.0, (3, 2): 1.5}``.
        scope: "all", "prefill" or "decode".

    γ = 1 is the identity and leaves the model's own path untouched.
    """

    heads: tuple[Head, ...]
    values: tuple[float, ...]
    scope: Scope

    name = "scale_heads"

    def __init__(self, gains: Mapping[Any, float], scope: Scope = "all"):
        heads = {Head.parse(h): float(g) for h, g in gains.items()}
        object.__setattr__(self, "heads", tuple(heads))
        object.__setattr__(self, "values", tuple(heads.values()))
        object.__setattr__(self, "scope", scope)
        self._check_scope()
        if not all(abs(g) < float("inf") for g in self.values):
            raise EditError("Gains of scale_heads must be finite numbers.")

    def is_identity(self) -> bool:
        return all(g == 1.0 for g in self.values)

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        gains = torch.ones(z.shape[2], device=z.device, dtype=z.dtype)
        for head, gain in zip(self.heads, self.values, strict=True):
            if head.head in self.heads_at(call.site) and head.layer == call.site.layer:
                gains[head.head] = gain
        return z * gains[:, None]  # (batch, queries, heads, d) · (heads, 1)

    def fields(self) -> dict[str, Any]:
        return dict(gains={str(h): g for h, g in zip(self.heads, self.values, strict=True)}, scope=self.scope)
