"""Attention weights for who asks for them, as edits leave them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from interp_hooks.call import AttentionCall
from interp_hooks.steered import Steered, cut
from interp_hooks.weight_rows import WeightRows, of_heads, ranges, up_to
from interp_kernels.reference import weights


def weights_of(call: AttentionCall, steers: Sequence[Steered] = ()) -> torch.Tensor:
    """The attention weights (batch, heads, queries, keys) under the steers, of the queries' type;
    L × L, for who asks for them."""
    assert call.query is not None
    return row_weights(call, steers, 0, call.n_queries).to(call.query.dtype)


def row_weights(
    call: AttentionCall, steers: Sequence[Steered], first: int, last: int
) -> torch.Tensor:
    """(batch, heads, last − first, keys) float32 or wider: the weights of these query rows."""
    query, key = call.query, call.key
    assert query is not None and key is not None
    inner = {edge for s in steers for edge in s.rows if first < edge < last}
    edges = sorted({first, last} | inner)
    parts = []
    for start, stop in itertools.pairwise(edges):
        part = call.part(start, stop)
        here = [cut(s, start, stop) for s in steers if s.rows[0] <= start and stop <= s.rows[1]]
        parts.append(weights(query[:, :, start:stop], key, **part.settings, steer=here or None))
    return torch.cat(parts, 2)


@torch.no_grad()
def hand_rows(call: AttentionCall, wanted: WeightRows, steers: Sequence[Steered] = ()) -> None:
    """Hands the weights of a call, as the steers leave them, to who wants their rows."""
    heads = wanted.heads
    if call.pattern is not None:  # someone else computed it, edits and all
        pattern = call.pattern if heads is None else call.pattern[:, list(heads)]
        wanted.take(call, 0, pattern.float())
        return
    assert call.query is not None
    n = call.query.shape[1] if heads is None or steers else len(heads)
    # what an edit says, it says of all heads: they are computed together, and picked afterwards
    own = call if heads is None or steers else of_heads(call, heads)
    for start, stop in ranges(call, n, wanted.at_once):
        rows = row_weights(own if steers else up_to(own, stop), steers, start, stop)
        picked = rows if heads is None or not steers else rows[:, list(heads)]
        wanted.take(call, start, picked.float())
