"""One query row over a request's pages: its weights and its output, by PyTorch or by the kernel."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from interp_kernels.paged import RowChange, reweighed, row_output, row_weights
from interp_vllm.layout import Layout

#: where the kernel may be asked for
DEVICES = ("cuda",)


class Row(Protocol):
    """A query row over its keys, under what an edit changes of its logits."""

    def weights(self, q: Tensor, change: RowChange | None = None) -> Tensor:
        """(heads, length)."""

    def output(self, q: Tensor, change: RowChange | None = None) -> Tensor:
        """(heads, d_v)."""

    def changed(self, q: Tensor, own: Tensor, change: RowChange) -> Tensor:
        """The output under a change, where the engine's own output (heads, d_v) is of the same
        query without."""


def row_over(
    layout: Layout, cache: Tensor, blocks: Tensor, length: int, scale: float, q: Tensor
) -> Row:
    """By the kernel where the device has one and the layout is even, else by PyTorch.

    Args:
        layout, cache: where keys and values lie.
        blocks: (pages,) of the request, in their order.
        length: tokens of them that the row sees.
        scale: of the logits.
        q: (heads, d) the row's query.
    """
    views = layout.views(cache) if q.device.type in DEVICES and find_spec("triton") else None
    if views is not None:
        from interp_kernels.paged_decode import serves  # wants Triton

        if serves(q, *views):
            return KernelRow(*views, blocks, length, scale)
    return DenseRow(layout, cache, blocks, length, scale)


class DenseRow:
    """By PyTorch, from a copy of the request's pages; what was once read or weighed is kept."""

    def __init__(
        self, layout: Layout, cache: Tensor, blocks: Tensor, length: int, scale: float
    ) -> None:
        self.layout, self.cache, self.blocks = layout, cache, blocks
        self.length, self.scale = length, scale
        self.keys = layout.read_keys(cache, blocks)
        self._plain: tuple[Tensor, Tensor] | None = None

    def weights(self, q: Tensor, change: RowChange | None = None) -> Tensor:
        if change is not None:
            return row_weights(q, self.keys, self.length, scale=self.scale, change=change)
        if self._plain is None or self._plain[0] is not q:
            self._plain = q, row_weights(q, self.keys, self.length, scale=self.scale)
        return self._plain[1]

    def output(self, q: Tensor, change: RowChange | None = None) -> Tensor:
        values = self.layout.read_values(self.cache, self.blocks, self.length)
        return row_output(self.weights(q, change), values)

    def changed(self, q: Tensor, own: Tensor, change: RowChange) -> Tensor:
        if change.mild and own.dtype == torch.float32:  # only the spans' values are read
            return reweighed(own, self.weights(q), change, self._values)
        return self.output(q, change)

    def _values(self, start: int, stop: int) -> Tensor:
        """(kv_heads, stop − start, d_v)."""
        first, size = start // self.layout.size, self.layout.size
        pages = self.blocks[first : -(-stop // size)]
        there = self.layout.read_values(self.cache, pages, stop - first * size)
        return joined(there, stop - first * size)[0, :, start - first * size :]


class KernelRow:
    """By the decode kernel, which reads pages where they lie; the last answer is kept."""

    def __init__(
        self, keys: Tensor, values: Tensor, blocks: Tensor, length: int, scale: float
    ) -> None:
        self.keys, self.values, self.blocks = keys, values, blocks
        self.length, self.scale = length, scale
        self._asked: tuple[Tensor, RowChange | None] | None = None
        self._found: tuple[Tensor, Tensor] | None = None

    def _answer(self, q: Tensor, change: RowChange | None) -> tuple[Tensor, Tensor]:
        """(output, weights)."""
        from interp_kernels.paged_decode import paged_row

        if self._asked is None or self._asked[0] is not q or self._asked[1] is not change:
            self._found = paged_row(
                q, self.keys, self.values, self.blocks, self.length,
                scale=self.scale, change=change,
            )  # fmt: skip
            self._asked = q, change
        assert self._found is not None
        return self._found

    def weights(self, q: Tensor, change: RowChange | None = None) -> Tensor:
        return self._answer(q, change)[1]

    def output(self, q: Tensor, change: RowChange | None = None) -> Tensor:
        return self._answer(q, change)[0]

    def changed(self, q: Tensor, own: Tensor, change: RowChange) -> Tensor:
        return self.output(q, change)


def joined(pages: Tensor, length: int) -> Tensor:
    """(1, kv_heads, length, d) of pages (pages, kv_heads, size, d)."""
    count, kv_heads, size, d = pages.shape
    return pages.transpose(0, 1).reshape(1, kv_heads, count * size, d)[:, :, :length]
