"""Scenes as pictures: coloured pictograms on a textured background."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from interp.scenes.world import COLORS, OBJECTS, Scene

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pixels a side, of a picture and of a cell.
SIZE, CELL = 48, 16
_SPRITE, _FINE = 14, 8  # pixels of a pictogram, and each one's side while drawing

# Pictograms on a square of 14 units: (form, filled, numbers); coordinates are x, y pairs, y
# downwards.
_DRAWINGS: dict[str, list[tuple[str, int, str]]] = {
    "table": [
        ("rectangle", 1, "0 4 14 6.5"),
        ("rectangle", 1, "1.5 6 3.5 13"),
        ("rectangle", 1, "10.5 6 12.5 13"),
    ],
    "chair": [
        ("rectangle", 1, "3 1 5 13"),
        ("rectangle", 1, "3 7 11 9"),
        ("rectangle", 1, "9 8 11 13"),
    ],
    "cup": [
        ("polygon", 1, "2 4 10 4 9 12 3 12"),
        ("ellipse", 1, "8 5 13 10"),
        ("ellipse", 0, "9.3 6.2 11.7 8.8"),
    ],
    "plate": [
        ("ellipse", 1, "0 4 14 12"),
        ("ellipse", 0, "2 5.4 12 10.6"),
        ("ellipse", 1, "4 6.4 10 9.6"),
    ],
    "tree": [
        ("polygon", 1, "7 0 12.5 10.5 1.5 10.5"),
        ("rectangle", 1, "6 10 8 14"),
    ],
    "bird": [
        ("ellipse", 1, "3 5 11 11"),
        ("ellipse", 1, "9 2 13 6"),
        ("polygon", 1, "0 3 6 6 4 9"),
    ],
    "car": [
        ("rectangle", 1, "0 6 14 10.5"),
        ("polygon", 1, "3 6 5 2.5 9.5 2.5 11.5 6"),
        ("ellipse", 1, "1.5 8.5 5.5 12.5"),
        ("ellipse", 1, "8.5 8.5 12.5 12.5"),
    ],
    "sign": [
        ("polygon", 1, "4.5 0 9.5 0 12 2.5 12 5.5 9.5 8 4.5 8 2 5.5 2 2.5"),
        ("rectangle", 1, "6.3 8 7.7 14"),
    ],
    "bed": [
        ("rectangle", 1, "0 3 2 13"),
        ("rectangle", 1, "0 8 14 11"),
        ("rectangle", 1, "12 8 14 13"),
        ("ellipse", 1, "2.5 5 6.5 8.5"),
    ],
    "lamp": [
        ("polygon", 1, "4.5 0 9.5 0 12.5 6 1.5 6"),
        ("rectangle", 1, "6.3 6 7.7 12"),
        ("rectangle", 1, "3.5 12 10.5 14"),
    ],
    "house": [
        ("polygon", 1, "7 0 14 6 0 6"),
        ("rectangle", 1, "1.5 6 12.5 14"),
        ("rectangle", 0, "5.5 9 8.5 14"),
    ],
    "fence": [
        ("rectangle", 1, "1 2 3 13"),
        ("rectangle", 1, "6 2 8 13"),
        ("rectangle", 1, "11 2 13 13"),
        ("rectangle", 1, "0 4.5 14 6"),
        ("rectangle", 1, "0 9 14 10.5"),
    ],
    "ball": [
        ("ellipse", 1, "1 1 13 13"),
    ],
    "box": [
        ("rectangle", 1, "1.5 1.5 12.5 12.5"),
    ],
    "star": [
        ("polygon", 1, "7 0 8.7 5 14 5.2 9.8 8.4 11.3 13.6 7 10.5 2.7 13.6 4.2 8.4 0 5.2 5.3 5"),
    ],
    "ring": [
        ("ellipse", 1, "0.5 0.5 13.5 13.5"),
        ("ellipse", 0, "3.8 3.8 10.2 10.2"),
    ],
}


@cache
def sprites() -> dict[str, np.ndarray]:
    """name → (14, 14) coverage, 0 … 1."""
    from PIL import Image as Pictures
    from PIL import ImageDraw

    by_name = {}
    side = _SPRITE * _FINE
    for name in OBJECTS:
        canvas = Pictures.new("L", (side, side))
        draw = ImageDraw.Draw(canvas)
        for form, filled, numbers in _DRAWINGS[name]:
            getattr(draw, form)([float(n) * _FINE for n in numbers.split()], fill=255 * filled)
        fine = np.asarray(canvas, dtype=np.float32) / 255
        by_name[name] = fine.reshape(_SPRITE, _FINE, _SPRITE, _FINE).mean((1, 3))
    return by_name


@cache
def _smooth() -> np.ndarray:
    """(48, 7): a coarse row of numbers, drawn out in straight lines between them."""
    at = np.linspace(0, 6, SIZE)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(7))).astype(np.float32)


def ground(seed: int) -> np.ndarray:
    """(48, 48, 3) float32, 0 … 255: a dull colour with clouds, stripes or checks, and grain."""
    rng = np.random.default_rng(seed)
    color = rng.uniform(60, 130) + rng.uniform(-18, 18, 3)
    kind, strength = rng.integers(3), rng.uniform(6, 20)
    if kind == 0:
        texture = _smooth() @ rng.standard_normal((7, 7)) @ _smooth().T
    else:
        angle, period, phase = rng.uniform(0, np.pi), rng.uniform(5, 12), rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[:SIZE, :SIZE] * (2 * np.pi / period)
        texture = np.sin(x * np.cos(angle) + y * np.sin(angle) + phase)
        if kind == 2:
            texture = texture * np.sin(y * np.cos(angle) - x * np.sin(angle))
    grain = rng.standard_normal((SIZE, SIZE, 1)) * 5
    return (color + (strength * texture)[..., None] + grain).astype(np.float32)


def pixels(scene: Scene) -> np.ndarray:
    """(48, 48, 3) uint8."""
    canvas = ground(scene.ground)
    for thing in scene.things:
        top = CELL * thing.row + (CELL - _SPRITE) // 2 + thing.shift[0]
        left = CELL * thing.column + (CELL - _SPRITE) // 2 + thing.shift[1]
        where = canvas[top : top + _SPRITE, left : left + _SPRITE]
        cover = (sprites()[thing.name] * thing.shown)[..., None]
        where += cover * (np.array(COLORS[thing.color], dtype=np.float32) - where)
    return canvas.clip(0, 255).astype(np.uint8)


def render(scene: Scene, size: int = SIZE) -> Image:
    """The scene as a picture, enlarged to `size` pixels a side."""
    from PIL import Image as Pictures

    picture = Pictures.fromarray(pixels(scene))
    return picture if size == SIZE else picture.resize((size, size), Pictures.Resampling.NEAREST)
