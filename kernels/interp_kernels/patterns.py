"""Statistics and edits of attention weights that someone else materialised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .masking import Visibility, compute_dtype
from .reference import edited, statistics
from .request import Mask, Request
from .steer import Steer


def visible(mask: Mask, batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """Which query sees which key, as one matrix. It is L × L: for small inputs only.

    Args:
        mask: `Mask`.
        batch: samples.
        queries: query rows.
        keys: key columns.
        device: where the result is wanted.

    Returns:
        (batch or 1, heads or 1, queries, keys) bool.

    Raises:
        ValueError: naming the field of the mask that does not fit.

    Example:
        >>> visible(Mask(), 1, 2, 2, torch.device("cpu"))[0, 0]
        tensor([[ True, False],
                [ True,  True]])
    """
    vis = Visibility(mask, batch, 1, queries, keys, device)
    return vis.visible(slice(None), slice(None), 0, queries, 0, keys)


def steer_pattern(pattern: Tensor, mask: Mask, steers: Sequence[Steer]) -> Tensor:
    """Attention weights after the edits, their gains left out.

    The logits are not at hand, but A ∝ e^logit: temper t and bias b give A' ∝ A^t · e^b.

    Args:
        pattern: (batch, heads, queries, keys) weights.
        mask: `Mask` they were computed under.
        steers: the edits, in their order.

    Returns:
        The edited weights, of the same shape and dtype.

    Raises:
        ValueError: for `sigmoid`, which needs the logits themselves.

    Example:
        >>> pattern = torch.tensor([[[[0.2, 0.8]]]])
        >>> own = Steer(blend=torch.tensor([0.5]))
        >>> steer_pattern(pattern, Mask(q_start=1), [own])
        tensor([[[[0.1000, 0.9000]]]])
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
    """Requested statistics of attention weights.

    Args:
        pattern: (batch, heads, queries, keys) weights.
        mask: `Mask` they were computed under.
        request: `Request`, the statistics wanted.

    Returns:
        The statistics by name, as in `Result`.

    Raises:
        ValueError: naming the field of the mask that does not fit.

    Example:
        >>> pattern = torch.tensor([[[[0.2, 0.8]]]])
        >>> pattern_statistics(pattern, Mask(q_start=1), Request(frozenset({"argmax"})))
        {'argmax': tensor([[[1]]])}
    """
    batch, heads, queries, keys = pattern.shape
    vis = Visibility(mask, batch, heads, queries, keys, pattern.device)
    seen = vis.visible(slice(None), slice(None), 0, queries, 0, keys).expand(pattern.shape)
    weights = torch.where(seen, pattern.to(compute_dtype(pattern)), 0.0)
    return statistics(weights, seen, vis, request)
