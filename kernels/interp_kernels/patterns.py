"""The same statistics from a pattern that someone else materialised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .masking import Visibility, compute_dtype
from .reference import edited, statistics
from .request import Mask, Request
from .steer import Steer


def visible(mask: Mask, batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """(batch or 1, heads or 1, queries, keys) bool: who sees whom. It is L × L: for small inputs
    only."""
    vis = Visibility(mask, batch, 1, queries, keys, device)
    return vis.visible(slice(None), slice(None), 0, queries, 0, keys)


def steer_pattern(pattern: Tensor, mask: Mask, steers: Sequence[Steer]) -> Tensor:
    """Attention weights `pattern` (batch, heads, queries, keys) after the edits, their gains left
    out.

    The logits are not at hand, but A ∝ e^logit: temper t and bias b give A' ∝ A^t · e^b. Raises
    `ValueError` for `sigmoid`, which needs the logits themselves.
    """
    if any(s.sigmoid is not None for s in steers):
        raise ValueError("steer.sigmoid needs logits, and here there are only attention weights.")
    batch, heads, queries, keys = pattern.shape
    vis = Visibility(mask, batch, heads, queries, keys, pattern.device)
    seen = vis.visible(slice(None), slice(None), 0, queries, 0, keys).expand(pattern.shape)
    a = torch.where(seen, pattern.to(compute_dtype(pattern)), 0.0)
    if any(s.temper is not None or s.bias is not None for s in steers):
        logits = a.log()
        for steer in steers:
            if steer.temper is not None:
                logits = logits * steer.temper.to(a)[..., None]
        for steer in steers:
            if steer.bias is not None:
                logits = logits + steer.bias.to(a)[:, :, None]
        logits = logits.masked_fill(a == 0, -torch.inf)
        empty = (logits == -torch.inf).all(-1, keepdim=True)
        a = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    sink = torch.zeros_like(a[..., :1])
    for steer in steers:
        a, sink = edited(a, sink, seen, vis, steer)
    return a.to(pattern.dtype)


@torch.no_grad()
def pattern_statistics(pattern: Tensor, mask: Mask, request: Request) -> dict[str, Tensor]:
    """Requested statistics of attention weights `pattern` (batch, heads, queries, keys) under
    `mask`."""
    batch, heads, queries, keys = pattern.shape
    vis = Visibility(mask, batch, heads, queries, keys, pattern.device)
    seen = vis.visible(slice(None), slice(None), 0, queries, 0, keys).expand(pattern.shape)
    weights = torch.where(seen, pattern.to(compute_dtype(pattern)), 0.0)
    return statistics(weights, seen, vis, request)
