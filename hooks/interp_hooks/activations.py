"""What flows between heads in one forward: queries, keys, values and z of every head, and the
residual stream, live.

`capture_z` and `capture_resid` give copies to look at. Wires are the tensors of the computation
themselves: gradients flow through them, and any of them can be replaced on the way, which is what
patching and attribution are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch

from interp_hooks.call import AttentionCall
from interp_hooks.edit import Edit
from interp_hooks.errors import TapError

#: q and z (batch, queries, heads, d_head); k and v (batch, keys, kv_heads, d_head); the stream
#: (batch, queries, d_model): pre (on entry of a layer), mid (after attention; absent in parallel
#: blocks), post, final
PLACES = ("q", "k", "v", "z", "pre", "mid", "post", "final")

Rewrite = Callable[[str, int, torch.Tensor], "torch.Tensor | None"]


class Wires(dict[tuple[str, int], torch.Tensor]):
    """(place, layer) → the tensor as it flowed on, of the last forward. "final" has the last
    layer's number."""


class Splice(Edit):
    """Lets `see(place, layer, tensor)` look at, and replace, q, k, v (`projections`) and z of the
    main tower."""

    def __init__(self, see: Rewrite, projections: bool):
        self._see, self._projections = see, projections

    def touches(self, call: AttentionCall) -> bool:
        return call.site.is_main

    def before(self, call: AttentionCall) -> AttentionCall:
        if not self._projections:
            return call
        assert call.query is not None and call.key is not None
        given = {
            "query": call.query,
            "key": call.key,
            "value": call.value,
        }  # (batch, heads, tokens, d)
        changed = {}
        for name, tensor in given.items():
            new = self._see(name[0], call.site.layer, tensor.transpose(1, 2))
            if new is not None:
                changed[name] = new.transpose(1, 2)
        return replace(call, **changed) if changed else call  # type: ignore[arg-type]

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        new = self._see("z", call.site.layer, z)
        return z if new is None else new


def watcher(wires: Wires, keep: Collection[str], write: Rewrite | None) -> Rewrite:
    """`write`, with the tensors at the places in `keep` noted as they flow on. Raises `TapError`
    for other places."""
    unknown = [place for place in keep if place not in PLACES]
    if unknown:
        raise TapError(f"There is no wire {unknown[0]!r}; they are {', '.join(PLACES)}.")

    def see(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        new = None if write is None else write(place, layer, tensor)
        if place in keep:
            # a view of its own, and that one flows on: a gradient with respect to it is all that
            # comes after it
            new = (tensor if new is None else new).view_as(tensor)
            wires[place, layer] = new
        return new

    return see
