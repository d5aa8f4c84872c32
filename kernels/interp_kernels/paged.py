"""Attention of single query rows over a cache in pages, dense: O(keys), as every decode step is.

A serving engine keeps the keys and values of a sequence in pages of some 16 to 128 tokens that lie
anywhere in memory. What is read here is the pages of a row's sequence in their order, as views: no
page is copied, turned or joined. Rows of several sequences under the same edits go together.
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
    q: Tensor,
    keys: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    change: RowChange | None = None,
) -> Tensor:
    """Weights (rows, heads, longest) of single queries, each over the first tokens of its pages.

        s = temper · scale · q·k + ln g        A = softmax(s)

    Behind a row's length, and in one all of whose keys are hidden, weights are 0.

    Args:
        q: (rows, heads, d); head h reads key-value head h // (heads // kv_heads).
        keys: (rows, pages, kv_heads, size, d) in any strides, token t of a row at page t // size,
            slot t % size; what stands behind its length is not seen.
        lengths: tokens that each row sees, at most pages · size.
        scale: of the logits.
        change: what edits do to the logits of all of them.

    Returns:
        the weights in float32 (float64 where q is).

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> from interp_kernels.paged import row_weights
        >>> q, keys = torch.ones(2, 3, 8), torch.zeros(2, 2, 1, 4, 8)
        >>> row_weights(q, keys, [5, 2], scale=1.0)[:, 0]
        tensor([[0.2000, 0.2000, 0.2000, 0.2000, 0.2000],
                [0.5000, 0.5000, 0.0000, 0.0000, 0.0000]])
    """
    rows, pages, kv_heads, size, d = keys.shape
    heads, longest = q.shape[1], max(lengths)
    fits = len(lengths) == rows and min(lengths) > 0 and longest <= pages * size
    if q.shape[0] != rows or q.shape[2] != d or heads % kv_heads or not fits:
        raise ValueError(
            f"Query rows {tuple(q.shape)} do not fit pages {tuple(keys.shape)} that hold "
            f"{', '.join(map(str, lengths))} tokens."
        )
    dtype = compute_dtype(q)
    grouped = q.to(dtype).view(rows, 1, kv_heads, heads // kv_heads, d) * scale
    s = torch.matmul(grouped, keys.to(dtype).transpose(-1, -2))  # (rows, pages, kv, group, size)
    s = s.permute(0, 2, 3, 1, 4).reshape(rows, heads, pages * size)[..., :longest]
    if change is not None and change.temper is not None:
        s = s * change.temper.to(s)
    for start, stop, bias in () if change is None else change.spans:
        s[..., start:stop] += bias.to(s)
    if min(lengths) < longest:
        s = s.masked_fill(_behind(lengths, longest, s.device)[:, None], -torch.inf)
    a = torch.softmax(s, -1)
    if change is not None and change.hides:
        a = torch.where(torch.isfinite(s).any(-1, keepdim=True), a, 0.0)
    return a


def _behind(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor:
    """(rows, longest) bool: the column stands behind the row's length."""
    columns = torch.arange(longest, device=device)
    return columns >= torch.tensor(list(lengths), device=device)[:, None]


def row_output(weights: Tensor, values: Tensor) -> Tensor:
    """(rows, heads, d_v): weights (rows, heads, longest) times values (rows, pages, kv_heads, size,
    d_v), which are finite behind a row's length too.

    Example:
        >>> from interp_kernels.paged import row_output
        >>> row_output(torch.tensor([[[0.25, 0.25, 0.5]]]), torch.ones(1, 2, 1, 2, 3))
        tensor([[[1., 1., 1.]]])
    """
    rows, pages, kv_heads, size, _ = values.shape
    heads, longest = weights.shape[1:]
    if longest < pages * size:
        weights = torch.nn.functional.pad(weights, (0, pages * size - longest))
    parts = weights.view(rows, kv_heads, heads // kv_heads, pages, size).permute(0, 3, 1, 2, 4)
    z = torch.matmul(parts, values.to(weights.dtype)).sum(1)  # (rows, kv_heads, group, d_v)
    return z.reshape(rows, heads, -1)


def reweighed(
    z: Tensor, weights: Tensor, change: RowChange, values: Callable[[int, int], Tensor]
) -> Tensor:
    """The output (rows, heads, d_v) of rows whose spans get g times their weight, from the output z
    without: values are read on the spans alone.

        z' = (z + Σ_S (g_S − 1) Σ_{k in S} A_k v_k) / (1 + Σ_S (g_S − 1) Σ_{k in S} A_k)

    For g < 1 this subtracts, and an error of z grows up to 1/g times: for what `RowChange.mild`
    says alone, in float32.

    Args:
        z: (rows, heads, d_v) in float32 or wider.
        weights: (rows, heads, longest) of the same rows.
        change: without a temper; spans that do not overlap.
        values: (start, stop) → (rows, kv_heads, stop − start, d_v), finite.

    Example:
        >>> from interp_kernels.paged import RowChange, reweighed
        >>> twice = RowChange(spans=((0, 1, torch.tensor([[2.0]]).log()),))
        >>> v, a = torch.tensor([[[[4.0], [0.0]]]]), torch.tensor([[[0.5, 0.5]]])
        >>> reweighed(torch.tensor([[[2.0]]]), a, twice, lambda i, j: v[:, :, i:j])
        tensor([[[2.6667]]])
    """
    rows, heads, longest = weights.shape
    total = torch.ones_like(z[..., :1])
    for start, stop, bias in change.spans:
        stop = min(stop, longest)
        if start >= stop:
            continue
        added = weights[..., start:stop] * torch.expm1(bias).to(weights)  # (rows, heads, n)
        v = values(start, stop).to(added)
        grouped = added.view(rows, v.shape[1], heads // v.shape[1], -1)  # (rows, kv, group, n)
        z = z + torch.matmul(grouped, v).reshape(rows, heads, -1)
        total = total + added.sum(-1, keepdim=True)
    return z / total
