"""What flows between heads in one forward: queries, keys, values and z of every head, and the
residual stream, live.

`capture_z` and `capture_resid` give copies to look at. Activations are the tensors of the
computation themselves: gradients flow through them, and any of them can be replaced on the way,
which is what patching and attribution are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch

from interp_hooks.call import AttentionCall
from interp_hooks.edit import LiveEdit
from interp_hooks.errors import TapError

#: q and z (batch, queries, heads, d_head); k and v (batch, keys, kv_heads, d_head); the stream
#: (batch, queries, d_model): pre (on entry of a layer), mid (after attention; absent in parallel
#: blocks), post, final
PLACES = ("q", "k", "v", "z", "pre", "mid", "post", "final")

#: hook(place, layer, tensor) looks at a tensor on its way, and may return what flows on instead
Hook = Callable[[str, int, torch.Tensor], "torch.Tensor | None"]


class Activations(dict[tuple[str, int], torch.Tensor]):
    """The tensors of the last forward as they flowed on, (place, layer) → tensor.

    "final" has the last layer's number. `HookedModel.activations` fills it.

    Example:
        >>> with model.activations("q", "final") as kept:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> sorted(kept)[:2], kept["q", 0].shape
        ([('final', 3), ('q', 0)], torch.Size([1, 8, 8, 32]))
    """


class Residual(dict[Any, torch.Tensor]):
    """The residual stream of a block: ("pre" | "mid" | "post", layer) or "final" → tensor.

    Tensors are (batch, queries, d_model), appended over forwards; empty where nothing is kept.

    Example:
        >>> with model.capture_resid() as resid:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> resid["mid", 2].shape
        torch.Size([1, 8, 128])
    """

    def __init__(self, kept: bool = True):
        super().__init__()
        self.kept = kept

    def append(self, key: Any, value: torch.Tensor) -> None:
        if self.kept:
            self[key] = torch.cat([self[key], value], 1) if key in self else value


class ReplaceActivations(LiveEdit):
    """Lets a hook look at, and replace, q, k, v (`projections`) and z of the main tower."""

    def __init__(self, hook: Hook, projections: bool):
        self._hook, self._projections = hook, projections

    def touches(self, call: AttentionCall) -> bool:
        return call.site.is_main

    def before(self, call: AttentionCall) -> AttentionCall:
        if not self._projections:
            return call
        assert call.query is not None and call.key is not None
        inputs = {"query": call.query, "key": call.key, "value": call.value}
        changed = {}
        for name, tensor in inputs.items():  # (batch, heads, tokens, d)
            new = self._hook(name[0], call.site.layer, tensor.transpose(1, 2))
            if new is not None:
                changed[name] = new.transpose(1, 2)
        return replace(call, **changed) if changed else call  # type: ignore[arg-type]

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        new = self._hook("z", call.site.layer, z)
        return z if new is None else new


def noting(activations: Activations, keep: Collection[str], write: Hook | None) -> Hook:
    """`write`, with the tensors at the places in `keep` noted as they flow on. Raises `TapError`
    for other places."""
    unknown = [place for place in keep if place not in PLACES]
    if unknown:
        raise TapError(f"There is no activation {unknown[0]!r}; they are {', '.join(PLACES)}.")

    def hook(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        new = None if write is None else write(place, layer, tensor)
        if place in keep:
            # a view of its own, and that one flows on: a gradient with respect to it is all that
            # comes after it
            new = (tensor if new is None else new).view_as(tensor)
            activations[place, layer] = new
        return new

    return hook
