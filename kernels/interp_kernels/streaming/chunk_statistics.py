"""Statistics of the weights of one chunk of query rows, put among the whole call's.

p·inverse are the weights A (batch, heads, rows, columns); inverse (batch, heads, rows) is 0 for
rows that are padding or see nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..masking import Visibility
from ..request import Request

#: A row maximum over so few columns, of so few logits, is one call with its index: a decode step
#: is bound by the number of calls.
_FEW_COLUMNS, _FEW_LOGITS = 1024, 1 << 13


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


class Results:
    """Output, log-sum-exp and statistics of a call, chunk by chunk. What rows that see nothing
    report is there from the start: 0, −∞ for the log-sum-exp and −1 for an index; where one chunk
    is the `whole` call, its tensors are kept as they are."""

    def __init__(self, call: Call, whole: bool) -> None:
        self.call, self.whole = call, whole
        self.values: dict[str, Tensor] = {}
        request = call.request
        #: In the order in which they are reported.
        self.names = ["out", "lse", *sorted(request.names - {"pair_mass", "argmax", "group_mass"})]
        self.names += [name for name in ("argmax", "group_mass") if name in request.names]
        self.names += [f"pair_mass:{name}" for name in request.pairs]
        for name in request.received:
            self.names += [f"received:{name}", f"received_count:{name}"]
        self.names += ["topk_index", "topk_prob"] if request.topk else []
        for name in self.names:
            if not whole or name.startswith("received"):  # which is added up in any case
                self.values[name] = self._empty(name)

    def _empty(self, name: str) -> Tensor:
        call, vis, request = self.call, self.call.vis, self.call.request
        shape: tuple[int, ...] = (vis.batch, vis.heads, vis.lq)
        dtype, fill = call.dtype, 0.0
        if name == "out":
            shape, dtype = (*shape, call.v.shape[3] if request.out else 0), call.v.dtype
        elif name == "lse":
            fill = -torch.inf
        elif name in ("argmax", "topk_index"):
            dtype, fill = torch.int64, -1
        elif name == "group_mass":
            shape = (*shape, request.n_groups)
        elif name.startswith("received_count:"):
            shape, dtype = (vis.batch, 1, vis.lk), torch.int64
        elif name.startswith("received:"):
            shape = (vis.batch, vis.heads, vis.lk)
        if name.startswith("topk"):
            shape = (*shape, request.topk)
        if not fill:  # memory that the system zeroes when it is first touched
            return torch.zeros(shape, dtype=dtype, device=call.q.device)
        return torch.full(shape, fill, dtype=dtype, device=call.q.device)

    def put(self, name: str, value: Tensor, at: Chunk) -> None:
        """The chunk's rows of one statistic; value (batch, heads, rows, …)."""
        if self.whole:
            dtype = self.call.v.dtype
            own = name != "out" or value.dtype is dtype
            self.values[name] = value if own else value.to(dtype)
        else:
            self.values[name][at.bs, at.hs, at.r0 : at.r1] = value

    def put_topk(self, index: Tensor, prob: Tensor, at: Chunk) -> None:
        """The same for the strongest keys, of which a chunk may have fewer than were asked for."""
        lacking = self.call.request.topk - index.shape[-1]
        if lacking:
            index = torch.nn.functional.pad(index, (0, lacking), value=-1)
            prob = torch.nn.functional.pad(prob, (0, lacking))
        self.put("topk_index", index, at)
        self.put("topk_prob", prob, at)

    def statistics(self) -> dict[str, Tensor]:
        """By name, all but the output and the log-sum-exp."""
        return {name: self.values[name] for name in self.names[2:]}


@dataclass(frozen=True)
class Wanted:
    """What is asked of a block of heads: row_sets, the rows (batch, queries) that each question to
    the columns counts; onehot (batch · kv_heads, keys, groups), the labels of `group_mass`; and
    where the answers go."""

    request: Request
    vis: Visibility
    row_sets: dict[str, Tensor]
    onehot: Tensor
    results: Results


def row_max(s: Tensor, want_index: bool, block: int = 64) -> tuple[Tensor, Tensor | None]:
    """(…, rows) maximum and lowest column that has it. The maximum of each `block` of columns
    first: `max` with indices over a long row is several times slower than `amax`."""
    size = s.shape[-1]
    if not want_index:
        return s.amax(-1), None
    if size <= block or (size <= _FEW_COLUMNS and s.numel() <= _FEW_LOGITS):
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
    offset = vis.offset
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


def receive(p: Tensor, inverse: Tensor, wanted: Wanted, at: Chunk) -> None:
    """Adds Σ_rows A to the columns: all unbanded sets in one product, banded ones over their slice
    of columns. The largest weight of a column needs a pass over A itself."""
    received, row_sets = wanted.request.received, wanted.row_sets
    r0, r1, c0, c1 = at.r0, at.r1, at.c0, at.c1
    heads, n = p.shape[1], r1 - r0
    plain = [
        name
        for name, question in received.items()
        if question.band is None and question.reduce != "max"
    ]
    if plain:
        sets = torch.stack([row_sets[name][:, r0:r1] for name in plain], dim=1)
        weight = inverse[:, :, None] * sets[:, None]  # (batch, heads, sets, rows)
        sums = torch.bmm(weight.reshape(-1, len(plain), n), p.view(-1, n, c1 - c0)).view(
            -1, heads, len(plain), c1 - c0
        )
        for i, name in enumerate(plain):
            wanted.results.values[f"received:{name}"][at.bs, at.hs, c0:c1] += sums[:, :, i]
    for name in received:
        if name not in plain:
            _receive_one(name, p, inverse, wanted, at)


def _receive_one(name: str, p: Tensor, inverse: Tensor, wanted: Wanted, at: Chunk) -> None:
    """The same for one question with a band, or for the largest weight."""
    question, offset = wanted.request.received[name], wanted.vis.offset
    a, b = at.c0, at.c1
    if question.band is not None:
        low, high = question.band
        a, b = max(a, at.r0 + offset - high), min(b, at.r1 + offset - low)
    if a >= b:
        return
    weight = inverse * wanted.row_sets[name][:, None, at.r0 : at.r1]
    inside = p[..., a - at.c0 : b - at.c0]
    if question.band is not None:
        inside = inside * wanted.vis.band(question.band, at.r0, at.r1, a, b).to(p.dtype)
    column = wanted.results.values[f"received:{name}"][at.bs, at.hs, a:b]
    if question.reduce == "max":
        column.copy_(torch.maximum(column, (inside * weight[..., None]).amax(-2)))
    else:
        column += (weight[:, :, None] @ inside)[:, :, 0]


def from_weights(
    a: Tensor, shown: Tensor | None, counted: Tensor | None, wanted: Wanted, at: Chunk
) -> None:
    """All row and key statistics by their definitions, from weights A that are no softmax any more
    (edited ones).

    a (batch, heads, rows, columns), overwritten where rows are padding; shown, broadcastable to it:
    keys an index may name, None for all; counted (batch, 1, rows): real rows, None for all.
    """
    request, results = wanted.request, wanted.results
    names = request.names
    if counted is not None:
        a.mul_(counted[..., None])
    if "entropy" in names:
        results.put("entropy", torch.special.entr(a).sum(-1), at)
    if "max" in names:
        results.put("max", a.amax(-1), at)
    if "distance" in names or "capped_distance" in names:
        _distances(a, wanted, at)
    if "group_mass" in names:
        onehot = wanted.onehot[:, at.c0 : at.c1]
        mass = torch.bmm(a.view(len(onehot), -1, a.shape[-1]), onehot)
        results.put("group_mass", mass.view(*a.shape[:3], -1), at)
    for name, index in request.pairs.items():
        results.put(f"pair_mass:{name}", picked(a, index, at), at)
    if request.received:
        ones = a.new_ones(a.shape[:3])
        receive(a, ones if counted is None else ones * counted, wanted, at)
    if request.topk or "argmax" in names:
        ranked = a if shown is None else a.masked_fill(~shown, -1.0)
        if "argmax" in names:
            best, first = row_max(ranked, True)
            assert first is not None
            results.put("argmax", (first + at.c0).masked_fill_(hidden(best < 0, counted), -1), at)
        if request.topk:
            prob, index = ranked.topk(min(request.topk, a.shape[-1]), dim=-1)
            gone = hidden(prob < 0, None if counted is None else counted[..., None])
            results.put_topk((index + at.c0).masked_fill_(gone, -1), prob.clamp_min(0), at)


def _distances(a: Tensor, wanted: Wanted, at: Chunk) -> None:
    request, vis = wanted.request, wanted.vis
    distance = (vis.q_slots(at.r0, at.r1)[:, None] - vis.k_slots(at.c0, at.c1)).abs().to(a.dtype)
    if "distance" in request.names:
        wanted.results.put("distance", (a * distance).sum(-1), at)
    if "capped_distance" in request.names:
        near = distance.clamp(max=request.cap)
        wanted.results.put("capped_distance", (a * near).sum(-1), at)


def hidden(empty: Tensor, counted: Tensor | None) -> Tensor:
    """bool: nothing is seen, or the row is padding."""
    return empty if counted is None else empty | ~counted
