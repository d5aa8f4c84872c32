"""Random transformations of a picture that keep its size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

TRANSFORMS = (
    "horizontal_flip",
    "vertical_flip",
    "rotation",
    "color_jitter",
    "gaussian_blur",
    "crop",
)


def transformed(picture: Image, kind: str, rng: np.random.Generator) -> Image:
    """A picture of the same size: flipped; rotated by −180° … 180° on black; brightness, contrast
    and saturation × 0 … 2 and hue shifted by −0.5 … 0.5, in random order; blurred with σ 1.5 … 2
    pixels; or 8 … 100 % of it (sides 3:4 … 4:3) enlarged."""
    from PIL import ImageFilter, ImageOps

    if kind == "horizontal_flip":
        return ImageOps.mirror(picture)
    if kind == "vertical_flip":
        return ImageOps.flip(picture)
    if kind == "rotation":
        return picture.rotate(float(rng.uniform(-180, 180)))
    if kind == "gaussian_blur":
        return picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(1.5, 2.0))))
    if kind == "color_jitter":
        return _jittered(picture, rng)
    if kind == "crop":
        return _cropped(picture, rng)
    raise ValueError(f"There is no transformation {kind!r}.")


def _jittered(picture: Image, rng: np.random.Generator) -> Image:
    from PIL import ImageEnhance

    brightness, contrast, saturation = (float(rng.uniform(0, 2)) for _ in range(3))
    hue = int(rng.uniform(-0.5, 0.5) * 255)
    steps: list[Callable[[Image], Image]] = [
        lambda p: ImageEnhance.Brightness(p).enhance(brightness),
        lambda p: ImageEnhance.Contrast(p).enhance(contrast),
        lambda p: ImageEnhance.Color(p).enhance(saturation),
        lambda p: _turned(p, hue),
    ]
    for i in rng.permutation(len(steps)):
        picture = steps[i](picture)
    return picture


def _turned(picture: Image, hue: int) -> Image:
    """The hue of each pixel shifted by `hue` of 256."""
    from PIL import Image as images

    h, s, v = picture.convert("HSV").split()
    h = h.point([(i + hue) % 256 for i in range(256)])
    return images.merge("HSV", (h, s, v)).convert("RGB")


def _cropped(picture: Image, rng: np.random.Generator) -> Image:
    from PIL.Image import Resampling

    width, height = picture.size
    box = (width, height)
    for _ in range(10):  # a share and a shape that fit; else the whole picture
        area, shape = (
            width * height * rng.uniform(0.08, 1),
            math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))),
        )
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            box = (w, h)
            break
    left, top = (
        int(rng.integers(whole - part + 1))
        for whole, part in zip((width, height), box, strict=True)
    )
    return picture.crop((left, top, left + box[0], top + box[1])).resize(
        (width, height), Resampling.BILINEAR
    )
