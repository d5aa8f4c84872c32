"""What a weight is multiplied by beside V: its key's group, and where the key stands."""

from __future__ import annotations

import torch
from torch import Tensor


def features_of(
    labels: Tensor | None, groups: int, position: bool, batch: int, lk: int, tile: int, like: Tensor
) -> Tensor | None:
    """(batch, keys, 16 or 32): one-hot groups, and last how far a key stands from the middle of its
    tile."""
    if not groups and not position:
        return None
    size = 16 if groups + position <= 16 else 32
    kind = torch.float32 if like.dtype == torch.float32 else torch.float16
    made = torch.zeros(batch, lk, size, dtype=kind, device=like.device)
    if groups:
        assert labels is not None
        made[..., :groups] = labels[..., None] == torch.arange(groups, device=like.device)
    if position:
        made[..., -1] = torch.arange(lk, device=like.device) % tile - tile // 2
    return made
