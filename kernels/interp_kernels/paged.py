"""Attention of one query row over a cache in pages, dense: O(keys), as every decode step is.

A serving engine keeps the keys and values of a sequence in pages of some 16 to 128 tokens that lie
anywhere in memory. What is read here is one sequence's pages in their order, as views: no page is
copied, turned or joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .masking import compute_dtype
from .steer import Steer


@dataclass(frozen=True)
class RowChange:
    """What edits do to the logits of one row: s ← temper · s, then s_k + ln g on spans of keys.

    Attributes:
        temper: (heads, 1) inverse temperature; None for 1.
        spans: (start, stop, (heads, 1) ln g) of key columns, −inf where the keys are hidden.
    """

    temper: Tensor | None = None
    spans: tuple[tuple[int, int, Tensor], ...] = ()

    def __bool__(self) -> bool:
        return self.temper is not None or bool(self.spans)


def row_change(steers: Sequence[Steer], heads: int) -> RowChange | None:
    """The steers of one query row as a change of its logits; None where they are none.

    A temper is one, and so is a rule over spans that renormalises: weights times g, renormalised,
    are logits plus ln g. Rules of rows that it does not apply to, or that ask for masses, are not.

    Example:
        >>> from interp_kernels.paged import row_change
        >>> row_change([Steer(temper=torch.full((1, 1, 1), 2.0))], heads=2).temper.flatten()
        tensor([2., 2.])
    """
    temper: Tensor | None = None
    spans: list[tuple[int, int, Tensor]] = []
    for steer in steers:
        rules = steer.rules
        plain = all(r.renormalise and r.tests is None and r.rows is None for r in rules)
        shared = all(t is None or (len(t) == 1 and t.shape[2] == 1) for t in (steer.temper,))
        only = all(x is None for x in (steer.bias, steer.sigmoid, steer.blend, steer.gain))
        if not (plain and shared and only) or (rules and steer.labels is not None):
            return None
        if steer.temper is not None:
            own = steer.temper[0].expand(heads, 1)  # (heads, 1)
            temper = own if temper is None else temper * own
        for rule in rules:
            keep = rule.keep.expand(heads, rule.groups).log()  # (heads, groups)
            left = 0
            for start, stop, group in steer.spans:
                if start < left:  # overlapping spans: the later wins, which sums do not say
                    return None
                left = stop
                if start < stop and group:
                    spans.append((start, stop, (keep[:, group] - keep[:, 0])[:, None]))
    return RowChange(temper, tuple(spans))


def paged_row(
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    length: int,
    *,
    scale: float,
    change: RowChange | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Weights (heads, length) of one query over the first `length` tokens of its pages, and the
    output (heads, d_v).

        s = temper · scale · q·k + ln g        A = softmax(s)        z = A v

    A row all of whose keys are hidden has weights and output 0.

    Args:
        q: (heads, d); head h reads key-value head h // (heads // kv_heads).
        keys: (pages, kv_heads, size, d) in any strides, token t at page t // size, slot t % size;
            what stands behind `length` must be finite, and is not seen.
        values: (pages, kv_heads, size, d_v); None where no output is wanted.
        length: tokens seen, at most pages · size.
        scale: of the logits.
        change: what edits do to the logits.

    Returns:
        the weights in float32 (float64 where q is), the output in the dtype of q.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> from interp_kernels.paged import paged_row
        >>> pages = torch.zeros(2, 1, 4, 8)
        >>> paged_row(torch.ones(3, 8), pages, pages, 5, scale=1.0)[0][0]
        tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    pages, kv_heads, size, d = keys.shape
    heads = q.shape[0]
    if q.shape[1] != d or heads % kv_heads or not 0 < length <= pages * size:
        raise ValueError(
            f"A query row {tuple(q.shape)} does not fit pages {tuple(keys.shape)} that hold "
            f"{length} tokens."
        )
    group, dtype = heads // kv_heads, compute_dtype(q)
    rows = q.to(dtype).view(1, kv_heads, group, d) * scale
    s = torch.matmul(rows, keys.to(dtype).transpose(-1, -2))  # (pages, kv_heads, group, size)
    s = s.permute(1, 2, 0, 3).reshape(heads, pages * size)[:, :length]
    if change is not None and change.temper is not None:
        s = s * change.temper.to(s)
    hidden = False
    for start, stop, bias in () if change is None else change.spans:
        s[:, start:stop] += bias.to(s)
        hidden = hidden or bool(torch.isinf(bias).any())
    a = torch.softmax(s, -1)
    if hidden:
        a = torch.where(torch.isfinite(s).any(-1, keepdim=True), a, 0.0)
    if values is None:
        return a, None
    full = a if length == pages * size else torch.nn.functional.pad(a, (0, pages * size - length))
    parts = full.view(kv_heads, group, pages, size).permute(2, 0, 1, 3)
    z = torch.matmul(parts, values.to(dtype)).sum(0)  # (kv_heads, group, d_v)
    return a, z.reshape(heads, -1).to(q.dtype)
