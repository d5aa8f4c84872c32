"""How much is upcast at a time where a whole tensor of a long text would be."""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Elements held at a time: on a CPU small enough to stay in cache; elsewhere 32 MB of float32, of
#: which a few copies are less than 1 % of a model of 8 billion 16-bit weights.
_CPU, _DEVICE = 1 << 22, 1 << 23


def ranges(n: int, each: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(start, stop) of n rows of `each` elements, as many at a time as the budget allows.

    Example:
        >>> list(ranges(5, 1 << 21, torch.device("cpu")))
        [(0, 2), (2, 4), (4, 5)]
    """
    size = max(1, (_CPU if device.type == "cpu" else _DEVICE) // max(1, each))
    for start in range(0, n, size):
        yield start, min(start + size, n)


def vector_norms(x: torch.Tensor) -> torch.Tensor:
    """‖x‖₂ over the last dimension in float32, of (batch, heads, rows, d), some rows at a time.

    Example:
        >>> vector_norms(torch.tensor([[[[3.0, 4.0]]]]))
        tensor([[[5.]]])
    """
    batch, heads, n, d = x.shape
    if x.dtype == torch.float32 and not x.requires_grad:
        return x.norm(dim=-1)
    parts = [x[:, :, a:b].float().norm(dim=-1) for a, b in ranges(n, batch * heads * d, x.device)]
    none = x.new_empty(batch, heads, 0, dtype=torch.float32)
    return parts[0] if len(parts) == 1 else torch.cat([none, *parts], 2)
