"""Which part of a picture each image token of a prompt stands for, by the processor's own layout.

The processor cuts a picture as it likes: it resizes, crops and pads it, divides it into tiles, adds
a small copy of the whole. So it is asked: it is given a picture of the same size whose red channel
is the column and whose green channel is the row, and the numbers that come out say where each pixel
came from. From there on it is the model's rule by which patches become tokens: one table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import InputError
from interp.vision.prompts import needs_image_tokens, with_images
from interp_hooks.huggingface.images import (
    class_tokens,
    crosses,
    image_mask,
    image_token,
    takes_images,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from interp_hooks.model import HookedModel

#: left, top, right, bottom in shares of the picture's width and height; beyond 0 … 1 in padding
Box = tuple[float, float, float, float]
Inputs = Mapping[str, torch.Tensor]
#: how far a tile's pixels may be from a straight line of the picture's, in shares of its side
CROOKED = 0.03


@dataclass(frozen=True)
class TokenGrid:
    """Image tokens that lie on a part of the picture as a grid.

    box: the part; slots: (rows, columns) int, where each token stands in the prompt.
    """

    box: Box
    slots: torch.Tensor


@dataclass(frozen=True)
class _Tile:
    """One picture that the vision tower is given: its size in pixels, and the part it shows."""

    height: int
    width: int
    box: Box


def token_grids(model: HookedModel, inputs: Inputs, prompt: str, picture: Image) -> list[TokenGrid]:
    """The grids of the one picture of a prompt, in the order of its tokens.

    Tokens that stand for no part of it (at the ends of rows in LLaVA-NeXT) are in none.

    Args:
        model: a vision-language model.
        inputs: what `with_images` makes of the prompt and the picture, one sample.
        prompt, picture: these.

    Raises:
        InputError: a model whose image tokens stand for no parts of the picture (they are
            resampled), whose layout is not known, or that does not keep to it here.
    """
    config = model.module.config
    kind = str(getattr(config, "model_type", ""))
    slots = _image_slots(config, inputs)
    if kind in RESAMPLED:
        raise InputError(
            f"{model.name} resamples its picture: none of its {len(slots)} image tokens stands for "
            "a part of it, so their weights can't be laid over it."
        )
    rule = _rule(kind, config, inputs)
    if rule is None or crosses(config) or not takes_images(config) or not len(slots):
        raise InputError(
            f"Where the image tokens of {model.name} ({kind}) lie in the picture is not known, so "
            "their weights can't be laid over it."
        )
    return rule(_Case(model, inputs, prompt, picture, slots))


def grids_of(
    model: HookedModel, inputs: Inputs, prompt: str, pictures: Sequence[Image], k: int
) -> tuple[list[TokenGrid], torch.Tensor]:
    """The grids of the k-th picture of a prompt, and the slots of all its tokens, those in no grid
    too.

    Of several pictures, touching or not, each is laid out as it would be alone.

    Args:
        model: a vision-language model.
        inputs: what `with_images` makes of the prompt and its pictures, one sample.
        prompt, pictures: these.
        k: from 0.

    Raises:
        InputError: as `token_grids`; several pictures that have other tokens together than alone.
    """
    needs_image_tokens(model, "An overlay of attention")
    config = model.module.config
    if len(pictures) == 1:
        mask = image_mask(config, inputs["input_ids"], inputs)
        assert mask is not None
        return token_grids(model, inputs, prompt, pictures[0]), mask[0].nonzero().flatten()
    alone = [with_images(model, _ALONE, [picture]) for picture in pictures]
    own = [_image_slots(config, one) for one in alone]
    slots, counts = _image_slots(config, inputs), [len(one) for one in own]
    if sum(counts) != len(slots):
        raise InputError(
            f"{model.name} reads these {len(pictures)} pictures as {len(slots)} tokens, and as "
            f"{sum(counts)} one by one, so which token is which picture's is not known; give the "
            "picture alone."
        )
    mine = slots[sum(counts[:k]) : sum(counts[: k + 1])]
    grids = token_grids(model, alone[k], _ALONE, pictures[k])
    return [
        TokenGrid(grid.box, mine[torch.searchsorted(own[k], grid.slots.contiguous())])
        for grid in grids
    ], mine


#: a prompt for a picture alone
_ALONE = "picture"


def _image_slots(config: Any, inputs: Inputs) -> torch.Tensor:
    return torch.as_tensor(inputs["input_ids"][0] == image_token(config)).nonzero().flatten()


@dataclass(frozen=True)
class _Case:
    """One prompt with its picture; `slots` (tokens,) those of its image tokens."""

    model: HookedModel
    inputs: Inputs
    prompt: str
    picture: Image
    slots: torch.Tensor

    @property
    def config(self) -> Any:
        return self.model.module.config

    def refuse(self, why: str) -> InputError:
        return InputError(
            f"The {len(self.slots)} image tokens of {self.model.name} are no grids of this "
            f"picture ({why}), so their weights can't be laid over it."
        )

    def tiles(self) -> list[_Tile]:
        """What the vision tower is given, by asking the processor where each pixel comes from."""
        where, valid = self.coordinates()
        return [self._tile(w, v) for w, v in zip(where, valid, strict=True)]

    def coordinates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(tiles, 2, height, width) column and row of each pixel in shares of the picture, and
        (tiles, height, width) bool, whether it shows the picture at all."""
        width, height = self.picture.size
        ramp = np.zeros((height, width, 3))
        ramp[..., 0] = (np.arange(width) + 0.5)[None] / width
        ramp[..., 1] = (np.arange(height) + 0.5)[:, None] / height
        black, white, ramps = (
            self._pixels(p) for p in (np.zeros_like(ramp), np.ones_like(ramp), ramp)
        )
        span = white - black
        valid = (span.abs() > 1e-4).all(1)
        where = (ramps - black) / torch.where(span.abs() > 1e-4, span, 1.0)
        return where[:, :2], valid

    def _pixels(self, shares: np.ndarray) -> torch.Tensor:
        """(tiles, 3, height, width) that the processor makes of a picture."""
        picture = np.round(shares * 255).astype(np.uint8)
        made = with_images(self.model, self.prompt, [picture])
        pixels = made["pixel_values"]
        if made["input_ids"].shape != self.inputs["input_ids"].shape:
            raise self.refuse("its number depends on what the picture shows")
        if pixels.ndim == 5 and len(pixels) == 1:
            pixels = pixels[0]
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise self.refuse(f"its pixels are {tuple(pixels.shape)}")
        return pixels.double()

    def _tile(self, where: torch.Tensor, valid: torch.Tensor) -> _Tile:
        height, width = valid.shape
        across = _line(where[0], valid, 0)
        down = _line(where[1], valid, 1)
        if across is None or down is None:
            raise self.refuse("its tiles are no upright parts of the picture")
        return _Tile(height, width, (across[0], down[0], across[1], down[1]))

    def grid(self, tile: _Tile, slots: torch.Tensor) -> TokenGrid:
        """Tokens that fill a tile line by line, in the tile's own proportions."""
        n = len(slots)
        rows = round((n * tile.height / tile.width) ** 0.5)
        if not rows or n % rows or abs(rows / (n // rows) * tile.width / tile.height - 1) > 1e-6:
            raise self.refuse(f"{n} tokens for {tile.height} × {tile.width} pixels")
        return TokenGrid(tile.box, slots.view(rows, n // rows))


def _line(where: torch.Tensor, valid: torch.Tensor, axis: int) -> tuple[float, float] | None:
    """Where a tile's two edges lie, by the straight line through its pixels' places along `axis`
    (0: columns); None where they are on none."""
    seen = valid.any(axis)
    if int(seen.sum()) < 2:
        return None
    sums = torch.where(valid, where, 0.0).sum(axis)[seen]
    value = sums / valid.sum(axis)[seen]
    n = len(seen)
    place = ((torch.arange(n).double() + 0.5) / n)[seen]
    # pixels at the picture's edge are mixed with what is beyond it
    inner = slice(1, -1) if len(value) > 4 else slice(None)
    x, y = place[inner], value[inner]
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    start = y.mean() - slope * x.mean()
    if float(slope) <= 0 or float((start + slope * x - y).abs().max()) > CROOKED + 1 / 255:
        return None
    return float(start), float(start + slope)


def _by_tile(case: _Case) -> list[TokenGrid]:
    """As many tokens for each tile, in order of the tiles; perhaps one of the class before them."""
    tiles = case.tiles()
    if len(case.slots) % len(tiles):
        raise case.refuse(f"{len(tiles)} tiles")
    grids = []
    strategy = getattr(case.config, "vision_feature_select_strategy", "default")
    for tile, slots in zip(tiles, case.slots.chunk(len(tiles)), strict=True):
        if strategy == "full" and class_tokens(case.config.vision_config) == 1:
            patch = int(case.config.vision_config.patch_size)
            if len(slots) == (tile.height // patch) * (tile.width // patch) + 1:
                slots = slots[1:]
        grids.append(case.grid(tile, slots))
    return grids


def _by_rows(case: _Case) -> list[TokenGrid]:
    """Pixtral: one picture of any size, its rows of tokens parted by a token of text."""
    (tile,) = case.tiles()
    vision = case.config.vision_config
    step = int(vision.patch_size) * int(getattr(case.config, "spatial_merge_size", 1))
    ((height, width),) = torch.as_tensor(case.inputs["image_sizes"]).tolist()
    rows, columns = int(height) // step, int(width) // step
    if rows * columns != len(case.slots) or (tile.height, tile.width) != (height, width):
        raise case.refuse(f"{rows} × {columns} patches")
    return [TokenGrid(tile.box, case.slots.view(rows, columns))]


def _by_grid(case: _Case) -> list[TokenGrid]:
    """Qwen-VL and its like: the whole picture resized to a grid, its patches flattened."""
    ((_, tall, wide),) = case.inputs["image_grid_thw"].tolist()
    merge = int(getattr(case.config.vision_config, "spatial_merge_size", 1))
    rows, columns = tall // merge, wide // merge
    if rows * columns != len(case.slots):
        raise case.refuse(f"{rows} × {columns} patches")
    return [TokenGrid((0.0, 0.0, 1.0, 1.0), case.slots.view(rows, columns))]


def _packed(case: _Case) -> list[TokenGrid]:
    """LLaVA-NeXT and LLaVA-OneVision: the whole picture, then the tiles laid together, their
    padding cut off (and perhaps made smaller) by the model itself, a token at the end of each row.

    The model's own function is given each patch's place instead of its feature.
    """
    tiles, vision = case.tiles(), case.config.vision_config
    side = int(vision.image_size) // int(vision.patch_size)
    places = torch.stack([_centres(tile.box, side) for tile in tiles])  # (tiles, side², 3)
    more: dict[str, Any] = dict(image_newline=torch.full((3,), torch.nan))
    if "onevision" in case.config.model_type:
        more["vision_aspect_ratio"] = case.config.vision_aspect_ratio
    else:
        more["vision_feature_select_strategy"] = case.config.vision_feature_select_strategy
    pack = case.model.module.model.pack_image_features
    packed = pack([places.float()], case.inputs["image_sizes"].cpu(), **more)[0]
    placed = packed[0] if isinstance(packed, (list, tuple)) else packed
    if len(placed) != len(case.slots):
        raise case.refuse(f"the model makes {len(placed)}")
    whole, rest, at = side**2, placed[side**2 :], case.slots[side**2 :]
    grids = [TokenGrid(tiles[0].box, case.slots[:whole].view(side, side))]
    if not len(rest) or bool(rest.isnan().all()):
        return grids
    ends = rest.isnan().any(-1).nonzero().flatten()
    columns = int(ends[0])
    rows = len(rest) // (columns + 1)
    if not columns or ends.tolist() != [(columns + 1) * (k + 1) - 1 for k in range(rows)]:
        raise case.refuse("rows of several lengths")
    inside = rest.view(rows, columns + 1, 3)[:, :-1]
    box = tiles[1].box
    across = _edges(inside[0, :, 0], (box[2] - box[0]) / side)
    down = _edges(inside[:, 0, 1], (box[3] - box[1]) / side)
    kept = at.view(rows, columns + 1)[:, :-1]
    return [*grids, TokenGrid((across[0], down[0], across[1], down[1]), kept)]


def _centres(box: Box, side: int) -> torch.Tensor:
    """(side², 3): column and row of each patch's middle in shares of the picture, and 1."""
    steps = (torch.arange(side).double() + 0.5) / side
    across, down = box[0] + steps * (box[2] - box[0]), box[1] + steps * (box[3] - box[1])
    rows, columns = torch.meshgrid(down, across, indexing="ij")
    return torch.stack([columns, rows, torch.ones_like(rows)], -1).flatten(0, 1)


def _edges(middles: torch.Tensor, step: float) -> tuple[float, float]:
    """The two edges of cells with these middles; `step` is the size of one alone."""
    if len(middles) > 1:
        step = float(middles[-1] - middles[0]) / (len(middles) - 1)
    return float(middles[0]) - step / 2, float(middles[-1]) + step / 2


#: model types whose tokens each hold something of the whole picture
RESAMPLED = frozenset(
    ("idefics", "idefics2", "blip-2", "instructblip", "kosmos-2", "kosmos-2.5", "aria")
)
#: model types in which each tile has as many tokens, line by line, in order of the tiles
BY_TILE = frozenset(
    ("llava", "vipllava", "paligemma", "gemma3", "internvl", "aya_vision", "idefics3", "smolvlm",
     "llama4")
)  # fmt: skip
BY_GRID = frozenset(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe"))
PACKED = frozenset(("llava_next", "llava_onevision"))


def _rule(kind: str, config: Any, inputs: Inputs) -> Callable[[_Case], list[TokenGrid]] | None:
    tower = str(getattr(getattr(config, "vision_config", None), "model_type", ""))
    if kind == "mistral3" or (kind == "llava" and tower == "pixtral"):
        return _by_rows
    if kind in PACKED:
        return _packed
    if kind in BY_GRID and "image_grid_thw" in inputs:
        return _by_grid
    return _by_tile if kind in BY_TILE else None
