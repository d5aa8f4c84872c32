"""Attention of blocks of query rows to lists of keys: no pass over the others, no mask of all."""

from __future__ import annotations

import torch
from torch import Tensor

from ..budget import ranges
from ..masking import FLOOR, INVISIBLE, compute_dtype


def attend_listed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    shown: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q·k)·v over the keys that blocks of query rows list, (batch, heads, queries, d_v).

    Keys and values are gathered once a block, some blocks at a time, so that queries · m products
    take the place of queries · keys. A row to which nothing is shown gives 0.

    Args:
        q: queries (batch, heads, blocks · rows, d).
        k: keys (batch, kv_heads, keys, d).
        v: values (batch, kv_heads, keys, d_v).
        columns: (batch or 1, heads or kv_heads, blocks, m) int key columns, in any order.
        shown: bool that broadcasts to (batch, columns' heads, blocks, rows, n): the row sees the
            column, of the last n ≤ m; it sees all before these. Of a column that is listed twice,
            one must be hidden.
        scale: of the logits; default d^−½.
        softcap: logits become softcap·tanh(logits / softcap).
        sinks: (heads,) extra logits without a value.

    Raises:
        ValueError: lists for other numbers of heads, or blocks that do not share the rows out.

    Example:
        >>> q = k = torch.zeros(1, 1, 2, 4)
        >>> v = torch.tensor([[[[1.0], [3.0]]]])
        >>> columns = torch.tensor([[[[1], [0]]]])  # two blocks of a row each
        >>> attend_listed(q, k, v, columns, torch.ones(1, 1, 2, 1, 1, dtype=torch.bool)).flatten()
        tensor([3., 1.])
    """
    batch, heads, lq, d = q.shape
    listing, blocks, m = columns.shape[1:]
    if listing not in (heads, k.shape[1]):
        raise ValueError(
            f"columns are of {listing} heads; there are {heads} query and {k.shape[1]} kv heads."
        )
    if not blocks or lq % blocks:
        raise ValueError(f"{blocks} blocks can't share {lq} query rows evenly.")
    rows = lq // blocks
    dtype = compute_dtype(q, k, v)
    group = heads // k.shape[1]
    if listing == heads:
        # a list a query head: each reads its kv head by itself
        of = torch.arange(heads, device=q.device) // group
    else:
        of = torch.arange(listing, device=q.device)
    scale = d**-0.5 if scale is None else scale
    # query heads that share a list stand side by side as rows: keys are gathered once for all
    mine = heads // listing
    grouped = q.view(batch, listing, mine, blocks, rows, d)
    masked = shown.shape[-1]
    hidden = ~shown.expand(*shown.shape[:2], blocks, rows, masked)
    sink = None if sinks is None else sinks.to(dtype).view(1, listing, mine, 1, 1, 1)
    out = v.new_empty(batch, listing, mine, blocks, rows, v.shape[3])
    for a, b in ranges(blocks, batch * listing * m * max(d, v.shape[3]), q.device):
        at = columns[:, :, a:b].clamp(0, max(0, k.shape[2] - 1)).expand(batch, -1, -1, -1)
        keys, values = gathered(k, at, of, dtype), gathered(v, at, of, dtype)
        queries = grouped[:, :, :, a:b].transpose(2, 3).to(dtype) * scale
        # (batch · lists · blocks, query heads · rows, m)
        logits = torch.bmm(queries.reshape(-1, mine * rows, d), keys.flatten(0, 2).mT)
        if softcap is not None:
            logits = logits.mul_(1 / softcap).tanh_().mul_(softcap)
        logits = logits.view(batch, listing, b - a, mine, rows, m)
        logits[..., m - masked :].masked_fill_(hidden[:, :, a:b, None], INVISIBLE)
        top = logits.amax(-1, keepdim=True).clamp_min(FLOOR)
        if sink is not None:
            top = torch.maximum(top, sink.transpose(2, 3))
        p = logits.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        if sink is not None:
            total = total + (sink.transpose(2, 3) - top).exp()
        z = torch.bmm(p.view(-1, mine * rows, m), values.flatten(0, 2))
        z = z.view(*p.shape[:-1], -1) / torch.where(total > 0, total, 1)
        out[:, :, :, a:b] = z.transpose(2, 3).to(v.dtype)
    return out.view(batch, heads, lq, -1)


def gathered(x: Tensor, at: Tensor, of: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, lists, blocks, m, d): rows `at` (batch, lists, blocks, m) of the heads `of`; whole
    rows are copied, which gather would do element by element."""
    batch, heads, n, d = x.shape
    start = (torch.arange(batch, device=x.device)[:, None] * heads + of) * n
    flat = (at + start[:, :, None, None]).flatten()
    return x.reshape(-1, d).index_select(0, flat).to(dtype).view(*at.shape, d)
