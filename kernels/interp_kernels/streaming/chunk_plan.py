"""How a pass over all keys is cut: blocks of heads, and chunks of query rows whose logits fit a
memory budget.

On a CPU a chunk's logits should stay in cache. On other devices every operation is a launch, which
takes the host some microseconds however small it is, so chunks are as large as one may ask for:
rows of one kv head after the other, more of them where causality leaves them fewer keys. A call of
L tokens, H heads and N bytes of budget takes at least 2·H·L²/N chunks of float32 logits (512 a
layer at 131,072 tokens, 32 heads and 2 GiB).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call
from ..looking import may_look
from ..masking import Visibility

#: Bytes that a chunk's buffers of logits may take on other devices than a CPU.
DEVICE_BYTES = 2 << 30
#: There, query rows a chunk that are worth one head less at a time (keys and values of the heads
#: are upcast), and at most (the mask of the square on the diagonal is held, and half of the square
#: is wasted, so no more than this part of all rows either).
_DEVICE_ROWS, _DEVICE_MOST, _DEVICE_PART = 1024, 4096, 8


class Sizes(NamedTuple):
    """Logits held at a time (elements a buffer); query rows a chunk, at least (fewer make products
    thin) and at most (more waste work on the causal diagonal); whether narrow chunks take more
    rows."""

    budget: int
    min_rows: int
    max_rows: int
    growing: bool = False


class Block(NamedTuple):
    """Batch entries b0:b1 and kv heads n0:n1, that is query heads n0·group : n1·group."""

    b0: int
    b1: int
    n0: int
    n1: int
    group: int

    @property
    def bs(self) -> slice:
        return slice(self.b0, self.b1)

    @property
    def ns(self) -> slice:
        return slice(self.n0, self.n1)

    @property
    def hs(self) -> slice:
        return slice(self.n0 * self.group, self.n1 * self.group)

    @property
    def heads(self) -> int:
        """Query heads of all its samples."""
        return (self.b1 - self.b0) * (self.n1 - self.n0) * self.group


def device_sizes(lq: int, dtype: torch.dtype, buffers: int) -> Sizes:
    """Sizes for a device whose operations are launches: `buffers` of logits within
    `DEVICE_BYTES`."""
    elements = DEVICE_BYTES // (dtype.itemsize * buffers)
    rows = min(max(_DEVICE_ROWS, lq // _DEVICE_PART), _DEVICE_MOST)
    return Sizes(elements, _DEVICE_ROWS, rows, growing=True)


def blocks_of(vis: Visibility, kv_heads: int, sizes: Sizes) -> tuple[list[Block], int]:
    """Blocks of (batch, kv heads), and rows a chunk of all keys such that its logits fit."""
    batch, group, lq, lk, budget = vis.batch, vis.heads // kv_heads, vis.lq, vis.lk, sizes.budget
    if lq <= sizes.max_rows and batch * vis.heads * lq * lk <= budget:  # as below, at once
        return [Block(0, batch, 0, kv_heads, group)], lq
    if sizes.growing:  # what a chunk sees of a window, say
        few = min(sizes.min_rows, lq)
        ends = [vis.span(r0, r0 + few) for r0 in (0, (lq - few) // 2, lq - few)]
        lk = max(1, *(c1 - c0 for c0, c1 in ends))
    per_unit = group * min(sizes.min_rows, lq) * lk
    units = min(max(1, budget // per_unit), batch * kv_heads)
    nb, nn = (max(1, units // kv_heads), kv_heads) if units >= kv_heads else (1, units)
    rows = min(
        max(budget // (nb * nn * group * lk), 1 if units == 1 else sizes.min_rows),
        sizes.max_rows,
        lq,
    )
    even = rows - rows % 8  # products like it
    if sizes.min_rows <= even and rows < lq:
        rows = even
    blocks = [
        Block(b, min(b + nb, batch), n, min(n + nn, kv_heads), group)
        for b in range(0, batch, nb)
        for n in range(0, kv_heads, nn)
    ]
    return blocks, rows


def chunks_of(
    vis: Visibility, heads: int, rows: int, sizes: Sizes
) -> Iterator[tuple[int, int, int, int]]:
    """(r0, r1, c0, c1): query rows and the columns they may see, for blocks of `heads` query heads;
    `rows` at a time, or as many as fit."""
    r0 = 0
    while r0 < vis.lq:
        r1 = _last_row(vis, heads, r0, sizes) if sizes.growing else min(r0 + rows, vis.lq)
        yield (r0, r1, *vis.span(r0, r1))
        r0 = r1


def rows_wanted(call: Call) -> Tensor | None:
    """(queries,) bool on the host: the rows whose weights something is asked of, where nothing but
    attention received by sets of queries is; None for all. A set on a device is not looked at."""
    request = call.request
    questions = list(request.received.values())
    others = request.out or request.lse or request.names or request.pairs or request.topk
    if others or not questions:
        return None
    sets = [question.queries for question in questions]
    if any(one is None or not may_look(one.device) for one in sets):
        return None
    return torch.stack([one.bool().any(0) for one in sets if one is not None]).any(0)


def cut_to(
    wanted: Tensor, vis: Visibility, chunks: list[tuple[int, int, int, int]]
) -> list[tuple[int, int, int, int]]:
    """The chunks from their first row that is wanted to the last, those without any left out."""
    cut = []
    for r0, r1, _, _ in chunks:
        rows = wanted[r0:r1].nonzero()
        if len(rows):
            a, b = r0 + int(rows[0]), r0 + int(rows[-1]) + 1
            cut.append((a, b, *vis.span(a, b)))
    return cut


def _last_row(vis: Visibility, heads: int, r0: int, sizes: Sizes) -> int:
    """Where a chunk ends that begins at r0 and has as many rows as fit, one at least: by
    halving."""
    low, high = r0 + 1, min(r0 + sizes.max_rows, vis.lq)
    while low < high:
        middle = (low + high + 1) // 2
        c0, c1 = vis.span(r0, middle)
        if heads * (middle - r0) * (c1 - c0) <= sizes.budget:
            low = middle
        else:
            high = middle - 1
    return low
