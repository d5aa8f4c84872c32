"""Statistics of the weights of one chunk of query rows, written into the whole call's tensors.

p·inverse are the weights A (batch, heads, rows, columns); inverse (batch, heads, rows) is 0 for
rows that are padding or see nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..masking import Visibility
from ..request import Request


@dataclass(frozen=True)
class Chunk:
    """Batch entries bs, query heads hs, query rows r0:r1 and the columns c0:c1 that they may
    see."""

    bs: slice
    hs: slice
    r0: int
    r1: int
    c0: int
    c1: int


def row_max(s: Tensor, want_index: bool, block: int = 64) -> tuple[Tensor, Tensor | None]:
    """(…, rows) maximum and lowest column that has it. The maximum of each `block` of columns
    first: `max` with indices over a long row is several times slower than `amax`."""
    size = s.shape[-1]
    if not want_index:
        return s.amax(-1), None
    if size <= block:
        return s.max(-1)
    whole = size - size % block
    parts = [s[..., :whole].unflatten(-1, (-1, block)).amax(-1)]
    parts += [s[..., whole:].amax(-1, keepdim=True)] if whole < size else []
    top, best = torch.cat(parts, dim=-1).max(-1)
    # The block's columns, all of them inside the row: the last window overlaps the block before,
    # which lacks the maximum, or it would have been chosen.
    start = (best * block).clamp_max_(size - block).flatten()
    row = torch.arange(len(start), device=s.device) * size
    windows = s.reshape(-1)[(row + start)[:, None] + torch.arange(block, device=s.device)]
    # The first hit by counting down: `amax` is vectorised, `argmax` is not.
    countdown = torch.arange(block, 0, -1, device=s.device, dtype=torch.int32)
    first = block - ((windows == top.reshape(-1, 1)) * countdown).amax(-1)
    return top, (start + first).view(best.shape)


def two_sided_distance(p: Tensor, scratch: Tensor, vis: Visibility, at: Chunk) -> Tensor:
    """Σ p·|q − k|. Without causality |q − k| is not linear in k, so it takes an element-wise
    product."""
    distance = (vis.q_slots(at.r0, at.r1)[:, None] - vis.k_slots(at.c0, at.c1)).abs().to(p.dtype)
    return torch.mul(p, distance, out=scratch).sum(-1)


def nearness(p: Tensor, vis: Visibility, cap: int, at: Chunk) -> Tensor:
    """Σ p·(cap − |q − k|)⁺: only keys nearer than cap count, a band along the diagonal; min(d, cap)
    is cap less it."""
    r0, r1, c0, c1 = at.r0, at.r1, at.c0, at.c1
    offset = vis.mask.q_start - vis.mask.k_start
    a, b = max(c0, r0 + offset - cap + 1), min(c1, r1 + offset + cap - 1)
    if a >= b:
        return p.new_zeros(p.shape[:3])
    if vis.mask.causal and r0 + offset - cap + 1 >= c0 and r1 + offset <= c1 and p.is_contiguous():
        # Away from the edges each row's last `cap` keys are a skewed view of p: no mask, no copy.
        batch, heads, n, width = p.shape
        first = p.storage_offset() + r0 + offset - cap + 1 - c0
        near = p.as_strided(
            (batch, heads, n, cap), (heads * n * width, n * width, width + 1, 1), first
        )
        return near @ torch.arange(1, cap + 1, dtype=p.dtype, device=p.device)
    distance = (vis.q_slots(r0, r1)[:, None] - vis.k_slots(a, b)).abs().to(p.dtype)
    return (p[..., a - c0 : b - c0] * (cap - distance).clamp_min_(0)).sum(-1)


def picked(p: Tensor, index: Tensor, at: Chunk) -> Tensor:
    """Σ p over the listed columns; index (batch or 1, queries or 1, m)."""
    index = (index[at.bs] if index.shape[0] > 1 else index).to(p.device)
    index = (index[:, at.r0 : at.r1] if index.shape[1] > 1 else index)[:, None]
    inside = (index >= at.c0) & (index < at.c1)
    column = (index - at.c0).clamp(0, at.c1 - at.c0 - 1).expand(*p.shape[:3], -1)
    return (p.gather(-1, column) * inside).sum(-1)


def receive(
    p: Tensor,
    inverse: Tensor,
    row_sets: dict[str, Tensor],
    request: Request,
    vis: Visibility,
    at: Chunk,
    stats: dict[str, Tensor],
) -> None:
    """Adds Σ_rows A to the columns: all unbanded sets in one product, banded ones over their slice
    of columns. The largest weight of a column needs a pass over A itself."""
    r0, r1, c0, c1 = at.r0, at.r1, at.c0, at.c1
    heads, n, offset = p.shape[1], r1 - r0, vis.mask.q_start - vis.mask.k_start
    plain = [
        n
        for n, question in request.received.items()
        if question.band is None and question.reduce != "max"
    ]
    if plain:
        sets = torch.stack([row_sets[name][:, r0:r1] for name in plain], dim=1)
        weight = inverse[:, :, None] * sets[:, None]  # (batch, heads, sets, rows)
        sums = torch.bmm(weight.reshape(-1, len(plain), n), p.view(-1, n, c1 - c0)).view(
            -1, heads, len(plain), c1 - c0
        )
        for i, name in enumerate(plain):
            stats[f"received:{name}"][at.bs, at.hs, c0:c1] += sums[:, :, i]
    for name, question in request.received.items():
        if name in plain:
            continue
        a, b = c0, c1
        if question.band is not None:
            low, high = question.band
            a, b = max(c0, r0 + offset - high), min(c1, r1 + offset - low)
        if a >= b:
            continue
        weight = inverse * row_sets[name][:, None, r0:r1]
        inside = p[..., a - c0 : b - c0]
        if question.band is not None:
            inside = inside * vis.band(question.band, r0, r1, a, b)
        column = stats[f"received:{name}"][at.bs, at.hs, a:b]
        if question.reduce == "max":
            column.copy_(torch.maximum(column, (inside * weight[..., None]).amax(-2)))
        else:
            column += (weight[:, :, None] @ inside)[:, :, 0]


def from_weights(
    a: Tensor,
    shown: Tensor,
    counted: Tensor,
    onehot: Tensor,
    row_sets: dict[str, Tensor],
    request: Request,
    vis: Visibility,
    at: Chunk,
    stats: dict[str, Tensor],
) -> None:
    """All row and key statistics by their definitions, from weights A that are no softmax any more
    (edited ones).

    a (batch, heads, rows, columns), overwritten where rows are padding; shown, broadcastable to it:
    keys an index may name; counted (batch, 1, rows): real rows; onehot (batch · kv_heads, columns,
    groups): labels of `group_mass`.
    """
    names, where = request.names, (at.bs, at.hs, slice(at.r0, at.r1))
    a.mul_(counted[..., None])
    distance = (vis.q_slots(at.r0, at.r1)[:, None] - vis.k_slots(at.c0, at.c1)).abs().to(a.dtype)
    if "entropy" in names:
        stats["entropy"][where] = torch.special.entr(a).sum(-1)
    if "max" in names:
        stats["max"][where] = a.amax(-1)
    if "distance" in names:
        stats["distance"][where] = (a * distance).sum(-1)
    if "capped_distance" in names:
        stats["capped_distance"][where] = (a * distance.clamp(max=request.cap)).sum(-1)
    if "group_mass" in names:
        mass = torch.bmm(a.view(len(onehot), -1, a.shape[-1]), onehot)
        stats["group_mass"][where] = mass.view(*a.shape[:3], -1)
    for name, index in request.pairs.items():
        stats[f"pair_mass:{name}"][where] = picked(a, index, at)
    receive(a, counted.expand(a.shape[:3]).to(a.dtype), row_sets, request, vis, at, stats)
    if request.topk or "argmax" in names:
        ranked = a.masked_fill(~shown, -1.0)
        if "argmax" in names:
            best, first = row_max(ranked, True)
            assert first is not None
            stats["argmax"][where] = (first + at.c0).masked_fill_((best < 0) | ~counted, -1)
        if request.topk:
            prob, index = ranked.topk(min(request.topk, a.shape[-1]), dim=-1)
            hidden = (prob < 0) | ~counted[..., None]
            stats["topk_index"][where][..., : index.shape[-1]] = (index + at.c0).masked_fill_(
                hidden, -1
            )
            stats["topk_prob"][where][..., : index.shape[-1]] = prob.clamp_min(0)
