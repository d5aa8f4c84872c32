"""The same statistics from a pattern that someone else materialised."""

from __future__ import annotations

import torch
from torch import Tensor

from .masking import Visibility, compute_dtype
from .reference import statistics
from .spec import Mask, Request


def visible(mask: Mask, batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """(batch or 1, heads or 1, queries, keys) bool: who sees whom. It is L × L: for small inputs only."""
    vis = Visibility(mask, batch, 1, queries, keys, device)
    return vis.visible(slice(None), slice(None), 0, queries, 0, keys)


@torch.no_grad()
def pattern_statistics(pattern: Tensor, mask: Mask, request: Request) -> dict[str, Tensor]:
    """Requested statistics of attention weights `pattern` (batch, heads, queries, keys) under `mask`."""
    batch, heads, queries, keys = pattern.shape
    vis = Visibility(mask, batch, heads, queries, keys, pattern.device)
    seen = vis.visible(slice(None), slice(None), 0, queries, 0, keys).expand(pattern.shape)
    weights = torch.where(seen, pattern.to(compute_dtype(pattern)), 0.0)
    return statistics(weights, seen, vis, request)
