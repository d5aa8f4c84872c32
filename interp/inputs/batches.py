"""Rows run together: left padding, and batches within a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: tokens of a forward, pads counted
BUDGET = 8192


def left_padded(
    rows: Sequence[Sequence[int]], pad: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """ids and mask (rows, longest) int64, and how many pads stand before each row."""
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = torch.tensor(row)
        mask[b, width - len(row) :] = 1
    return ids, mask, tuple(width - len(row) for row in rows)


def fits(widest: int, rows: int) -> bool:
    """Whether so many rows, the widest of them so long, are within the budget."""
    return widest * rows <= BUDGET


def rows_of(width: int) -> int:
    """How many rows of this width are run together, one at least."""
    return max(1, BUDGET // width)


def similar(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows that are run together: of similar length, within the budget, shortest
    first."""
    some: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if some and not fits(lengths[i], len(some) + 1):
            yield some
            some = []
        some.append(i)
    yield some
