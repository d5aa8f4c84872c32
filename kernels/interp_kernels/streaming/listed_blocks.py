"""Attention of blocks of query rows to lists of keys: no pass over the others, no mask of all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..budget import ranges
from ..masking import FLOOR, INVISIBLE, compute_dtype


class KeyLists(NamedTuple):
    """The keys that blocks of query rows read; query heads in order share the lists evenly.

    Args:
        columns: (batch or 1, lists, blocks, m) int key columns, in any order.
        shown: bool that broadcasts to (batch, lists, blocks, rows, n): the row sees the column, of
            the last n ≤ m; it sees all before these. Of a column that is listed twice one must be
            hidden; one outside the keys is hidden by itself among the last n.
        kv_heads: (lists,) the kv head that each list reads; by default there is a list a kv head,
            or one a query head.

    Raises:
        ValueError: from `attend_listed`, where they do not fit its tensors.

    Example:
        >>> KeyLists(torch.zeros(1, 1, 2, 3, dtype=torch.int64), torch.tensor(True)).kv_heads
    """

    columns: Tensor
    shown: Tensor
    kv_heads: Tensor | None = None


def attend_listed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: KeyLists,
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
        lists: the keys that each block reads.
        scale: of the logits; default d^−½.
        softcap: logits become softcap·tanh(logits / softcap).
        sinks: (heads,) extra logits without a value.

    Raises:
        ValueError: lists for other numbers of heads, blocks that do not share the rows out, or a
            gradient of q, k or v is wanted, which this does not have.

    Example:
        >>> q = k = torch.zeros(1, 1, 2, 4)
        >>> v = torch.tensor([[[[1.0], [3.0]]]])
        >>> columns = torch.tensor([[[[1], [0]]]])  # two blocks of a row each
        >>> attend_listed(q, k, v, KeyLists(columns, torch.ones(1, 1, 2, 1, 1).bool())).flatten()
        tensor([3., 1.])
    """
    batch, heads, lq, d = q.shape
    columns, shown = lists.columns, lists.shown
    listing, blocks, m = columns.shape[1:]
    of = _read(lists, heads, k.shape[1])
    _check(q, k, v, lists)
    out = v.new_zeros(batch, heads, lq, v.shape[3])
    if not out.numel() or not m or not k.shape[2]:
        return out
    dtype, rows = compute_dtype(q, k, v), lq // blocks
    scale = d**-0.5 if scale is None else scale
    # query heads that share a list stand side by side as rows: keys are gathered once for all
    mine = heads // listing
    grouped = q.reshape(batch, listing, mine, blocks, rows, d)
    parts = out.view(batch, listing, mine, blocks, rows, -1)
    masked = shown.shape[-1] if shown.ndim else m
    unsure = columns[..., m - masked :]
    inside = ((unsure >= 0) & (unsure < k.shape[2]))[:, :, :, None]
    hidden = ~(shown & inside).expand(-1, -1, -1, rows, -1)
    sink = None if sinks is None else sinks.to(dtype).view(1, listing, mine, 1, 1, 1)
    for a, b in ranges(blocks, batch * listing * m * max(d, v.shape[3]), q.device):
        at = columns[:, :, a:b].clamp(0, k.shape[2] - 1).expand(batch, -1, -1, -1)
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
        parts[:, :, :, a:b] = z.transpose(2, 3).to(v.dtype)
    return out


def _read(lists: KeyLists, heads: int, kv_heads: int) -> Tensor:
    """(lists,): the kv head that each list reads."""
    listing, device = lists.columns.shape[1], lists.columns.device
    if lists.kv_heads is not None:
        fits = len(lists.kv_heads) == listing and heads % listing == 0
    else:
        fits = listing in (heads, kv_heads) and heads % kv_heads == 0
    if not fits:
        raise ValueError(
            f"columns are of {listing} heads; there are {heads} query and {kv_heads} kv heads."
        )
    if lists.kv_heads is not None:
        return lists.kv_heads
    return torch.arange(listing, device=device) // (listing // kv_heads)


def _check(q: Tensor, k: Tensor, v: Tensor, lists: KeyLists) -> None:
    blocks, lq = lists.columns.shape[2], q.shape[2]
    if lq and (not blocks or lq % blocks):
        raise ValueError(f"{blocks} blocks can't share {lq} query rows evenly.")
    m, masked = lists.columns.shape[3], lists.shown.shape[-1:]
    if any(n > m for n in masked):
        raise ValueError(f"shown tells of {masked[0]} columns, and {m} are listed.")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("attention to lists has no gradient of q, k or v; hide keys by a mask.")


def gathered(x: Tensor, at: Tensor, of: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, lists, blocks, m, d): rows `at` (batch, lists, blocks, m) of the heads `of`; whole
    rows are copied, which gather would do element by element."""
    batch, _, n, d = x.shape
    steps = x.stride()[:3]
    if x.stride(3) != 1 or any(step % d for step in steps):
        x = x.contiguous()
        steps = x.stride()[:3]
    # rows of d elements in memory, wherever they stand: a cache's or a projection's are not copied
    by_batch, by_head, by_key = (step // d for step in steps)
    last = (batch - 1) * by_batch + (x.shape[1] - 1) * by_head + (n - 1) * by_key
    lines = x.as_strided((last + 1, d), (d, 1))
    start = torch.arange(batch, device=x.device)[:, None] * by_batch + of * by_head
    flat = (at * by_key + start[:, :, None, None]).flatten()
    return lines.index_select(0, flat).to(dtype).view(*at.shape, d)
