"""Single query rows over their requests' pages: weights and outputs, by PyTorch or the kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from interp_kernels.paged import RowChange, reweighed, row_output, row_weights
from interp_vllm.layout import Layout
from interp_vllm.step import Part

#: where the kernel may be asked for
DEVICES = ("cuda",)
#: tokens up to which rows of any length are read together
SHORT = 512
#: numbers that are read together, at most
TOGETHER = 1 << 26


class Rows(Protocol):
    """Query rows over their keys, under what an edit changes of their logits."""

    def weights(self, q: Tensor, change: RowChange | None = None) -> Tensor:
        """(rows, heads, longest), 0 behind a row's length."""

    def output(self, q: Tensor, change: RowChange | None = None) -> Tensor:
        """(rows, heads, d_v)."""

    def changed(self, q: Tensor, own: Tensor, change: RowChange) -> Tensor:
        """The outputs under a change, where the engine's own outputs (rows, heads, d_v) are of the
        same queries without."""


def rows_over(
    layout: Layout,
    cache: Tensor,
    table: Tensor,
    lengths: Sequence[int],
    scale: float,
    q: Tensor,
) -> Rows:
    """By the kernel where the device has one and the layout is even, else by PyTorch.

    Args:
        layout, cache: where keys and values lie.
        table: (rows, pages) the pages of each row's request in their order, or more.
        lengths: tokens that each row sees.
        scale: of the logits.
        q: (rows, heads, d) the queries.
    """
    blocks = own_pages(table, lengths, layout.size)
    views = layout.views(cache) if q.device.type in DEVICES and find_spec("triton") else None
    if views is not None:
        from interp_kernels.paged_decode import serves  # wants Triton

        if serves(q, *views):
            return KernelRows(*views, blocks, lengths, scale)
    return DenseRows(layout, cache, blocks, lengths, scale)


def alike(parts: Sequence[Part], each: int) -> Iterator[list[Part]]:
    """The parts, single rows, in groups that are read at once: none more than twice as long as
    another, but for short ones, and together within a budget; `each` numbers are read a token."""
    group: list[Part] = []
    for part in sorted(parts, key=lambda part: -part.position):
        if group:
            longest = group[0].position + 1
            short = longest > max(2 * (part.position + 1), SHORT)
            if short or (len(group) + 1) * longest * each > TOGETHER:
                yield group
                group = []
        group.append(part)
    if group:
        yield group


def own_pages(table: Tensor, lengths: Sequence[int], size: int) -> Tensor:
    """(rows, pages of the longest): what a table holds behind a row's last page is not a page of
    its request, and its first stands there instead."""
    counts = [-(-length // size) for length in lengths]
    blocks = table[:, : max(counts)]
    if min(counts) == max(counts):
        return blocks
    places = torch.arange(max(counts), device=table.device)
    there = places < torch.tensor(counts, device=table.device)[:, None]
    return torch.where(there, blocks, blocks[:, :1])


class DenseRows:
    """By PyTorch, from a copy of the requests' pages; what was once weighed is kept."""

    def __init__(
        self, layout: Layout, cache: Tensor, blocks: Tensor, lengths: Sequence[int], scale: float
    ) -> None:
        self.layout, self.cache, self.blocks = layout, cache, blocks
        self.lengths, self.scale = lengths, scale
        self.keys = layout.read_keys(cache, blocks)
        self._plain: tuple[Tensor, Tensor] | None = None

    def weights(self, q: Tensor, change: RowChange | None = None) -> Tensor:
        if change is not None:
            return row_weights(q, self.keys, self.lengths, scale=self.scale, change=change)
        if self._plain is None or self._plain[0] is not q:
            self._plain = q, row_weights(q, self.keys, self.lengths, scale=self.scale)
        return self._plain[1]

    def output(self, q: Tensor, change: RowChange | None = None) -> Tensor:
        values = self.layout.read_values(self.cache, self.blocks, self.lengths)
        return row_output(self.weights(q, change), values)

    def changed(self, q: Tensor, own: Tensor, change: RowChange) -> Tensor:
        if change.mild and own.dtype == torch.float32:  # only the spans' values are read
            return reweighed(own, self.weights(q), change, self._values)
        return self.output(q, change)

    def _values(self, start: int, stop: int) -> Tensor:
        """(rows, kv_heads, stop − start, d_v)."""
        first, size = start // self.layout.size, self.layout.size
        pages = self.blocks[:, first : -(-stop // size)]
        lengths = None
        if min(self.lengths) < stop:
            lengths = [max(0, min(n, stop) - first * size) for n in self.lengths]
        there = joined(self.layout.read_values(self.cache, pages, lengths))
        return there[:, :, start - first * size : stop - first * size]


class KernelRows:
    """By the decode kernel, which reads pages where they lie; the last answer is kept."""

    def __init__(
        self, keys: Tensor, values: Tensor, blocks: Tensor, lengths: Sequence[int], scale: float
    ) -> None:
        self.keys, self.values, self.blocks = keys, values, blocks
        self.lengths, self.scale = lengths, scale
        self._asked: tuple[Tensor, RowChange | None] | None = None
        self._found: tuple[Tensor, Tensor | None] | None = None

    def _answer(
        self, q: Tensor, change: RowChange | None, weighed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(outputs, weights or None)."""
        from interp_kernels.paged_decode import paged_rows

        same = self._asked is not None and self._asked[0] is q and self._asked[1] is change
        if self._found is None or not same or (weighed and self._found[1] is None):
            self._found = paged_rows(
                q, self.keys, self.values, self.blocks, self.lengths,
                scale=self.scale, change=change, weighed=weighed,
            )  # fmt: skip
            self._asked = q, change
        return self._found

    def weights(self, q: Tensor, change: RowChange | None = None) -> Tensor:
        found = self._answer(q, change, True)[1]
        assert found is not None
        return found

    def output(self, q: Tensor, change: RowChange | None = None) -> Tensor:
        return self._answer(q, change, False)[0]

    def changed(self, q: Tensor, own: Tensor, change: RowChange) -> Tensor:
        return self.output(q, change)


def joined(pages: Tensor) -> Tensor:
    """(rows, kv_heads, tokens, d) of pages (rows, pages, kv_heads, size, d)."""
    rows, count, kv_heads, size, d = pages.shape
    return pages.transpose(1, 2).reshape(rows, kv_heads, count * size, d)
