"""Statistics of a few rows from their raw scores, which are O(keys): the common ones in as few
operations as they take, since each costs more to launch than to do."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..call import Call
from ..masking import FLOOR
from .decode_launch import Decoded

#: Statistics that need no more than the weights and which of them are hidden.
_FEW = frozenset({"entropy", "max", "argmax"})


def statistics(call: Call, got: Decoded) -> dict[str, Tensor]:
    """What is asked, of the weights as the rule leaves them; as `reference.statistics`."""
    request, vis, scores = call.request, call.vis, got.scores
    assert scores is not None
    # −inf where a row sees nothing, and −inf − (−inf) is no weight
    a = scores.sub(got.lse.clamp_min(FLOOR)[..., None]).exp_()
    if got.factors is not None:
        _scale_(call, a, got.factors)
    asks_more = request.pairs or request.received or request.topk or not request.names <= _FEW
    if asks_more or vis.rows is not None or not vis.lk:
        every = slice(None)
        visible = vis.visible(every, every, 0, vis.lq, 0, vis.lk).expand(a.shape)
        return reference.statistics(a, visible, vis, request)
    stats: dict[str, Tensor] = {}
    if "entropy" in request.names:
        stats["entropy"] = torch.special.entr(a).sum(-1)
    if "argmax" in request.names:
        # the lowest of the visible where all weights are 0
        largest, stats["argmax"] = a.masked_fill_(scores == -torch.inf, -1.0).max(-1)
        stats["argmax"].masked_fill_(largest < 0, -1)
        if "max" in request.names:
            stats["max"] = largest.clamp_min_(0)
    elif "max" in request.names:
        stats["max"] = a.amax(-1)
    return stats


def _scale_(call: Call, a: Tensor, factors: Tensor) -> None:
    """Weights (batch, heads, queries, keys) times the factors (batch, heads, queries, groups) of
    their keys' groups, in place."""
    steer, lk = call.steer, call.vis.lk
    if steer.labels is None and len(call.segments) <= 8:
        for start, stop, group in call.segments:
            a[..., start:stop].mul_(factors[..., group : group + 1])
        return
    labels = steer.labels_of(lk, a.device)[:, :, None].expand(a.shape)
    a.mul_(factors.gather(-1, labels))
