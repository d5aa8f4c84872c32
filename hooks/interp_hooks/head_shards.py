"""Heads that several processes share out: tensor parallelism as an attention call sees it.

Each process has a contiguous range of the heads, in the order of ranks, with the key/value heads
that they read. What is told of an attention (statistics, z) is gathered, head by head; where an
edit acts, queries, keys and values are gathered, so that it acts on the whole call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


class _Whole(torch.autograd.Function):
    """All processes' parts of a tensor, one behind the other; the gradient of one's own comes
    back, for every process computes the same from the whole."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, dim: int, shards: HeadShards) -> torch.Tensor:
        ctx.dim, ctx.shards = dim, shards
        parts = [torch.empty_like(part) for _ in range(shards.size)]
        torch.distributed.all_gather(parts, part, group=shards.group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Own.apply(grads[0], ctx.dim, ctx.shards), None, None


class _Own(torch.autograd.Function):
    """One's own part of a tensor; the gradient is that of all parts together."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, dim: int, shards: HeadShards) -> torch.Tensor:
        ctx.dim, ctx.shards = dim, shards
        return whole.chunk(shards.size, dim)[shards.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Whole.apply(grads[0].contiguous(), ctx.dim, ctx.shards), None, None


@dataclass(frozen=True)
class HeadShards:
    """Over which processes the heads of an attention are shared out, equally.

    Attributes:
        group: the processes (`torch.distributed`).
        size, rank: how many there are, and which of them this is.
    """

    group: Any
    size: int
    rank: int

    def whole(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """All processes' parts, one behind the other along `dim`; every process must ask."""
        made: torch.Tensor = _Whole.apply(part.contiguous(), dim, self)
        return made

    def own(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's part of what every process has; the gradient asks every process."""
        made: torch.Tensor = _Own.apply(whole, dim, self)
        return made
