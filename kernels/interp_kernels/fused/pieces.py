"""States over some of the keys, and what part of each row's weights they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call


@dataclass
class Piece:
    """The state of `group` for rows start … start + rows: out (batch, heads, rows, d_v), lse
    (batch, heads, rows)."""

    group: int
    start: int
    out: Tensor
    lse: Tensor


def shares(pieces: Sequence[Piece], call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row: the pieces' shares (batch, heads, queries, pieces) of its weights, the sink
    logit's (…, 1), the log-sum-exp (batch, heads, queries) of all with 0 where there is none, and
    whether there is none; differentiable in the pieces' log-sum-exps and the sinks."""
    queries, sinks = call.vis.lq, call.sinks
    batch, heads = pieces[0].lse.shape[:2]
    # (batch, heads, queries, pieces), −inf where a piece has no such row
    lses = [
        torch.nn.functional.pad(
            p.lse, (p.start, queries - p.start - p.lse.shape[2]), value=-torch.inf
        )
        for p in pieces
    ]
    stacked = torch.stack(lses, -1)
    empty = stacked.amax(-1) == -torch.inf
    if sinks is not None:
        sink = sinks.to(stacked)[None, :, None, None].expand(batch, heads, queries, 1)
        stacked = torch.cat([stacked, sink], -1)
    stacked = stacked.masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(stacked, -1)
    share = (stacked - lse[..., None]).exp().masked_fill(empty[..., None], 0.0)
    gone = share[..., len(pieces) :].sum(-1, keepdim=True)  # a sink logit's
    return share[..., : len(pieces)], gone, lse, empty
