"""Attention weights themselves, a few rows at a time: L × L work in O(L) memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall

#: weights handed over at once, at most (16 MB in float32)
AT_ONCE = 1 << 22


@dataclass(frozen=True)
class WeightRows:
    """Asks for the attention weights of an attention call, some query rows at a time.

    Args:
        take: called as take(call, start, weights) for the rows start, start + 1, … of `call` in
            order, with weights (batch, heads, rows, columns) float32. Columns that none of these
            rows sees may be left out at the end.
        heads: which heads, in this order; None for all.
        at_once: how many weights are handed over at once, at most; one row at least.

    Example:
        >>> from interp_hooks import Question, WeightRows
        >>> rows = []
        >>> asked = Question(weights=WeightRows(lambda call, start, a: rows.append(a), (3,)))
        >>> with model.watch(asked, lambda stats: None):
        ...     _ = model.logits(torch.arange(8)[None])
        >>> rows[2].shape  # of layer 2: batch, heads, queries, keys
        torch.Size([1, 1, 8, 8])
    """

    take: Callable[[AttentionCall, int, torch.Tensor], None]
    heads: tuple[int, ...] | None = None
    at_once: int = AT_ONCE


def ranges(call: AttentionCall, heads: int, at_once: int) -> list[tuple[int, int]]:
    """(start, stop) of query rows whose weights are `at_once` at most."""
    rows = max(1, at_once // max(1, call.batch * heads * call.n_keys))
    return [(a, min(a + rows, call.n_queries)) for a in range(0, call.n_queries, rows)]


def of_heads(call: AttentionCall, heads: tuple[int, ...]) -> AttentionCall:
    """The call of these query heads alone, each with its own copy of keys and values."""
    query, key, mask, index = call.query, call.key, call.mask, list(heads)
    assert query is not None and key is not None
    # the call's own counts, which a layer may have other than its site's
    own = [h * key.shape[1] // query.shape[1] for h in heads]
    dense = mask.dense
    if dense is not None and dense.shape[1] > 1:
        mask = replace(mask, dense=dense[:, index])
    return replace(
        call,
        query=query[:, index],
        key=key[:, own],
        value=call.value[:, own],
        mask=mask,
        sinks=None if call.sinks is None else call.sinks[index],
    )


def up_to(call: AttentionCall, stop: int) -> AttentionCall:
    """The call without the keys that no query row before `stop` sees, where causality tells."""
    mask = call.mask
    last = mask.q_start + stop - mask.k_start
    if not mask.causal or not 0 < last < call.n_keys or call.key is None:
        return call
    cut = replace(
        mask,
        keys=None if mask.keys is None else mask.keys[:, :last],
        dense=None if mask.dense is None else mask.dense[..., :last],
    )
    return replace(call, key=call.key[:, :, :last], value=call.value[:, :, :last], mask=cut)
