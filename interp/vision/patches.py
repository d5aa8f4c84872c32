"""The patches of a picture as a vision tower sees them: a grid, perhaps with a class token before
it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp_hooks.huggingface.images import grid_of_patches

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall

#: query rows at a time
CHUNK = 32


@dataclass(frozen=True)
class PatchGrid:
    """`rows` × `columns` patches, read line by line, after the class token where there is one."""

    rows: int
    columns: int
    has_cls: bool

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @property
    def first(self) -> int:
        """The slot of the first patch."""
        return int(self.has_cls)

    def places(self, device: torch.device | None = None) -> torch.Tensor:
        """(patches, 2) float: row and column of each patch."""
        index = torch.arange(self.patches, device=device)
        return torch.stack([index // self.columns, index % self.columns], -1).float()

    def cells(self, side: int) -> torch.Tensor:
        """(slots,) int: the patches in side × side cells, numbered line by line; −1 for the class
        token."""
        row, column = self.places().T
        cell = (row * side // self.rows) * side + column * side // self.columns
        return torch.cat([torch.full((self.first,), -1), cell.long()])


def patch_grid(config: Any, length: int) -> PatchGrid | None:
    """The grid of a vision tower's `length` slots, by the model's config; None where they are not
    one picture's grid (pictures of any size, packed or resampled)."""
    shape = grid_of_patches(getattr(config, "vision_config", None))
    if shape is None:
        return None
    rows, columns = shape
    if length not in (rows * columns, rows * columns + 1):
        return None
    return PatchGrid(rows, columns, length > rows * columns)


def by_sample(values: torch.Tensor, samples: int) -> torch.Tensor:
    """(samples, heads) from (pictures or tiles, heads): the mean over a sample's, where all have
    the same number."""
    if len(values) % samples:
        return values.new_full((samples, values.shape[1]), torch.nan)
    return values.view(samples, -1, values.shape[1]).nanmean(1)


@torch.no_grad()
def mean_distance(call: AttentionCall, grid: PatchGrid) -> torch.Tensor:
    """(batch, heads): Σ_j A_ij ‖p_i − p_j‖ / Σ_j A_ij over patches j, mean over patches i, in
    patches.

    For a chunk of queries the distances to each are a value vector of the keys, so attention itself
    sums them: memory grows with the number of patches and not with its square.
    """
    from interp_kernels import attention

    assert call.query is not None and call.key is not None
    places = grid.places(call.value.device)
    kv_heads = call.key.shape[1]
    total = torch.zeros(call.batch, call.query.shape[1], device=call.value.device)
    for start in range(0, grid.patches, CHUNK):
        stop = min(grid.patches, start + CHUNK)
        part = call.part(grid.first + start, grid.first + stop)
        assert part.query is not None and part.key is not None
        far = torch.cdist(places, places[start:stop])  # (patches, rows)
        told = torch.cat([far, torch.ones_like(far[:, :1])], 1)
        told = torch.nn.functional.pad(told, (0, 0, grid.first, 0))  # nothing of the class token
        value = told.expand(call.batch, kv_heads, -1, -1)
        out = attention(
            part.query.float(),
            part.key.float(),
            value,
            **part.settings,
            backend="streaming",
        ).out  # (batch, heads, rows, rows + 1)
        own = out[..., :-1].diagonal(dim1=-2, dim2=-1)
        total += (own / out[..., -1].clamp_min(1e-30)).sum(-1)
    return total / grid.patches
