"""The patches of a picture as a vision tower sees them: a grid, perhaps with a class token and
registers before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp_hooks.huggingface.images import grid_of_patches, tokens_before

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall

#: query rows at a time
CHUNK = 32


@dataclass(frozen=True)
class PatchGrid:
    """`rows` × `columns` patches, read line by line, after the class token where there is one, and
    after `registers` further tokens."""

    rows: int
    columns: int
    has_cls: bool
    registers: int = 0

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @property
    def first(self) -> int:
        """The slot of the first patch."""
        return int(self.has_cls) + self.registers

    def places(self, device: torch.device | None = None) -> torch.Tensor:
        """(patches, 2) float: row and column of each patch."""
        index = torch.arange(self.patches, device=device)
        return torch.stack([index // self.columns, index % self.columns], -1).float()

    def cells(self, side: int) -> torch.Tensor:
        """(slots,) int: the patches in side × side cells, numbered line by line; −1 for the
        tokens before them."""
        row, column = self.places().T
        cell = (row * side // self.rows) * side + column * side // self.columns
        return torch.cat([torch.full((self.first,), -1), cell.long()])


def patch_grid(config: Any, length: int, pixels: tuple[int, int] | None = None) -> PatchGrid | None:
    """The grid of a vision tower's `length` slots, by the model's config; None where they are not
    one picture's grid (pictures of any size, packed, resampled or in random order).

    `pixels`: height and width of the pictures of a model that reads pictures alone, whose config is
    the tower's own; by default what the config says.
    """
    vision = getattr(config, "vision_config", None)
    if pixels is not None and vision is None:
        vision = config
    shape = grid_of_patches(vision, pixels)
    # ViTMAE shuffles its patches
    if shape is None or getattr(vision, "mask_ratio", None) is not None:
        return None
    patches, before = shape[0] * shape[1], tokens_before(vision)
    if patches < 1 or length not in (patches, patches + before):
        return None
    has_cls = length > patches
    return PatchGrid(*shape, has_cls, before - 1 if has_cls else 0)


def picture_size(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the pictures among a model's inputs, (0, 0) where they are no pictures of
    one size (patches in a row, videos)."""
    pictures = inputs.get("pixel_values")
    if not isinstance(pictures, torch.Tensor) or pictures.ndim != 4:
        return (0, 0)
    return int(pictures.shape[-2]), int(pictures.shape[-1])


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
        told = torch.nn.functional.pad(told, (0, 0, grid.first, 0))  # nothing of what is before
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
