"""What an edit's rules and its blend make of weights, as kernels read it: a factor for each row and
group of keys, and a weight for each row's own key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..masking import bias_visible
from ..steer import share_out
from .pieces import Piece, shares


@dataclass(frozen=True)
class Edited:
    """A' = A·factors[row, label of the key] + blend[row] on the row's own key.

    factors (batch, heads, queries, groups) float32, with what a blend leaves in them; labels (batch
    or 1, heads or 1, keys), None where all keys are in one group; blend (batch or 1, heads,
    queries) float32, 0 in rows that do not see their own key. None for what is not edited."""

    factors: Tensor | None = None
    labels: Tensor | None = None
    blend: Tensor | None = None

    def __bool__(self) -> bool:
        return self.factors is not None


def own_seen(call: Call) -> Tensor:
    """(batch or 1, heads or 1, queries) bool: the row sees its own key by the mask."""
    vis, dense = call.vis, call.mask.dense
    own = torch.arange(vis.lq, device=call.q.device) + vis.offset
    seen = ((own >= 0) & (own < vis.lk))[None, None]
    if not vis.lk:
        return seen
    own = own.clamp(0, vis.lk - 1)
    if vis.keys is not None:
        seen = seen & vis.keys[:, None, own]
    if dense is not None:
        at = own[:, None].expand(*dense.shape[:2], -1, -1)
        value = dense.to(own.device).gather(-1, at)[..., 0]
        seen = seen & (value if value.dtype == torch.bool else bias_visible(value))
    return seen


@torch.no_grad()
def edited(call: Call, pieces: Sequence[Piece]) -> Edited:
    """Of the call's edit, from the states of its groups of keys."""
    steer, vis = call.steer, call.vis
    factors = labels = blend = None
    if steer.rule is not None:
        share, gone, _, _ = shares(pieces, call)
        mass = [torch.zeros_like(share[..., 0])] * steer.groups
        for i, piece in enumerate(pieces):  # no index tensors, which would be copied to the device
            mass[piece.group] = mass[piece.group] + share[..., i]
        factors = share_out(torch.stack(mass, -1), steer.rules, gone)[0]
        labels = steer.labels_of(vis.lk, call.q.device)
    if steer.blend is not None:
        blend = steer.blend.float()[None, :, None] * own_seen(call)
        blend = blend.expand(-1, vis.heads, -1)
        left = (1 - blend)[..., None]
        if factors is None:
            factors = left.expand(vis.batch, -1, -1, -1)
        else:
            factors = factors * left
    return Edited(None if factors is None else factors.float().contiguous(), labels, blend)
