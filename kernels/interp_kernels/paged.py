"""Attention of one query row over a cache in pages, dense: O(keys), as every decode step is.

A serving engine keeps the keys and values of a sequence in pages of some 16 to 128 tokens that lie
anywhere in memory. What is read here is one sequence's pages in their order, as views: no page is
copied, turned or joined.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .masking import compute_dtype
from .steer import Steer

#: the least factor on weights for which an output is changed and not computed anew
MILD = 0.25


@dataclass(frozen=True)
class RowChange:
    """What edits do to the logits of one row: s ← temper · s, then s_k + ln g on spans of keys.

    Attributes:
        temper: (heads, 1) inverse temperature; None for 1.
        spans: (start, stop, (heads, 1) ln g) of key columns, −inf where the keys are hidden.
    """

    temper: Tensor | None = None
    spans: tuple[tuple[int, int, Tensor], ...] = ()

    @cached_property
    def hides(self) -> bool:
        """Whether a key of some head is hidden."""
        return any(bool(torch.isinf(bias).any()) for _, _, bias in self.spans)

    @cached_property
    def mild(self) -> bool:
        """Whether `reweighed` serves it: spans alone, apart from each other, no g below `MILD`."""
        spans = sorted(span[:2] for span in self.spans)
        apart = all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        least = min((float(bias.min()) for _, _, bias in self.spans), default=0.0)
        return self.temper is None and apart and least >= math.log(MILD) - 1e-6  # float32


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
        plain = all(r.adds_to_logits for r in rules)
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


def row_weights(
    q: Tensor, keys: Tensor, length: int, *, scale: float, change: RowChange | None = None
) -> Tensor:
    """Weights (heads, length) of one query over the first `length` tokens of its pages.

        s = temper · scale · q·k + ln g        A = softmax(s)

    A row all of whose keys are hidden has weights 0.

    Args:
        q: (heads, d); head h reads key-value head h // (heads // kv_heads).
        keys: (pages, kv_heads, size, d) in any strides, token t at page t // size, slot t % size;
            what stands behind `length` is not seen.
        length: tokens seen, at most pages · size.
        scale: of the logits.
        change: what edits do to the logits.

    Returns:
        the weights in float32 (float64 where q is).

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> from interp_kernels.paged import row_weights
        >>> row_weights(torch.ones(3, 8), torch.zeros(2, 1, 4, 8), 5, scale=1.0)[0]
        tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    pages, kv_heads, size, d = keys.shape
    heads = q.shape[0]
    if q.shape[1] != d or heads % kv_heads or not 0 < length <= pages * size:
        raise ValueError(
            f"A query row {tuple(q.shape)} does not fit pages {tuple(keys.shape)} that hold "
            f"{length} tokens."
        )
    dtype = compute_dtype(q)
    rows = q.to(dtype).view(1, kv_heads, heads // kv_heads, d) * scale
    s = torch.matmul(rows, keys.to(dtype).transpose(-1, -2))  # (pages, kv_heads, group, size)
    s = s.permute(1, 2, 0, 3).reshape(heads, pages * size)[:, :length]
    if change is None:
        return torch.softmax(s, -1)
    if change.temper is not None:
        s = s * change.temper.to(s)
    for start, stop, bias in change.spans:
        s[:, start:stop] += bias.to(s)
    a = torch.softmax(s, -1)
    if change.hides:
        a = torch.where(torch.isfinite(s).any(-1, keepdim=True), a, 0.0)
    return a


def row_output(weights: Tensor, values: Tensor) -> Tensor:
    """(heads, d_v): weights (heads, length) times values (pages, kv_heads, size, d_v), which are
    finite behind `length` too.

    Example:
        >>> from interp_kernels.paged import row_output
        >>> row_output(torch.tensor([[0.25, 0.25, 0.5]]), torch.ones(2, 1, 2, 3))
        tensor([[1., 1., 1.]])
    """
    pages, kv_heads, size, _ = values.shape
    heads, length = weights.shape
    if length < pages * size:
        weights = torch.nn.functional.pad(weights, (0, pages * size - length))
    parts = weights.view(kv_heads, heads // kv_heads, pages, size).permute(2, 0, 1, 3)
    z = torch.matmul(parts, values.to(weights.dtype)).sum(0)  # (kv_heads, group, d_v)
    return z.reshape(heads, -1)


def reweighed(
    z: Tensor, weights: Tensor, change: RowChange, values: Callable[[int, int], Tensor]
) -> Tensor:
    """The output (heads, d_v) of a row whose spans get g times their weight, from the output z
    without: values are read on the spans alone.

        z' = (z + Σ_S (g_S − 1) Σ_{k in S} A_k v_k) / (1 + Σ_S (g_S − 1) Σ_{k in S} A_k)

    For g < 1 this subtracts, and an error of z grows up to 1/g times: for what `RowChange.mild`
    says alone, in float32.

    Args:
        z: (heads, d_v) in float32 or wider.
        weights: (heads, length) of the same row.
        change: without a temper; spans that do not overlap.
        values: (start, stop) → (kv_heads, stop − start, d_v).

    Example:
        >>> from interp_kernels.paged import RowChange, reweighed
        >>> twice = RowChange(spans=((0, 1, torch.tensor([[2.0]]).log()),))
        >>> v, a = torch.tensor([[[4.0], [0.0]]]), torch.tensor([[0.5, 0.5]])
        >>> reweighed(torch.tensor([[2.0]]), a, twice, lambda i, j: v[:, i:j])
        tensor([[2.6667]])
    """
    heads, length = weights.shape
    more, total = torch.zeros_like(z), torch.ones_like(z[:, :1])
    for start, stop, bias in change.spans:
        stop = min(stop, length)
        if start >= stop:
            continue
        added = weights[:, start:stop] * torch.expm1(bias).to(weights)  # (heads, n)
        v = values(start, stop).to(added)
        grouped = added.view(len(v), heads // len(v), -1)  # (kv_heads, group, n)
        more += torch.matmul(grouped, v).reshape(heads, -1)
        total += added.sum(-1, keepdim=True)
    return (z + more) / total
