"""Pictures that show less than what is there: noise, blur, little contrast, faint things, in
levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from interp.errors import InputError
from interp.scenes.render import pixels
from interp.scenes.world import Scene

if TYPE_CHECKING:
    from PIL.Image import Image

LEVELS = (1, 2, 3)
#: standard deviation of the noise, in grey levels of 256
NOISE = (8.0, 14.0, 20.0)
#: standard deviation of the blur, in pixels of 48
BLUR = (0.8, 1.1, 1.4)
#: what is left of the distance to the picture's mean colour
CONTRAST = (0.5, 0.35, 0.2)
#: what is left of each thing's opacity
FAINT = (0.6, 0.4, 0.25)


def _noise(scene: Scene, level: int, rng: np.random.Generator) -> np.ndarray:
    shown = pixels(scene).astype(np.float32)
    return shown + rng.standard_normal(shown.shape).astype(np.float32) * NOISE[level]


def _blur(scene: Scene, level: int, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image as Pictures
    from PIL import ImageFilter

    picture = Pictures.fromarray(pixels(scene)).filter(ImageFilter.GaussianBlur(BLUR[level]))
    return np.asarray(picture, dtype=np.float32)


def _contrast(scene: Scene, level: int, rng: np.random.Generator) -> np.ndarray:
    shown = pixels(scene).astype(np.float32)
    middle = shown.mean((0, 1))
    return middle + CONTRAST[level] * (shown - middle)


def _faint(scene: Scene, level: int, rng: np.random.Generator) -> np.ndarray:
    things = tuple(replace(t, shown=t.shown * FAINT[level]) for t in scene.things)
    return pixels(replace(scene, things=things)).astype(np.float32)


_KINDS: dict[str, Callable[[Scene, int, np.random.Generator], np.ndarray]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "faint": _faint,
}
KINDS = tuple(_KINDS)


def check(kind: str | None, level: int) -> None:
    """Raise `InputError` for a damage that there is not."""
    if kind is not None and kind not in KINDS:
        raise InputError(f"The damages of a picture are {', '.join(KINDS)}, not {kind!r}.")
    if level not in LEVELS:
        raise InputError(f"The levels of damage are 1, 2 and 3, not {level!r}.")


def damaged(scene: Scene, kind: str | None, level: int = 2, seed: int = 0) -> Image:
    """The scene as a picture that shows less of it.

    Args:
        scene: what is there.
        kind: "noise", "blur", "contrast" (little of it) or "faint" (things, not the ground); None
            for the picture as it is.
        level: 1, 2 or 3, the most.
        seed: of the noise.

    Raises:
        InputError: no such damage or level.

    Example:
        >>> from interp import scenes
        >>> scene = scenes.usual(np.random.default_rng(0))
        >>> scenes.damaged(scene, "blur", 3).size
        (48, 48)
    """
    from PIL import Image as Pictures

    check(kind, level)
    if kind is None:
        return Pictures.fromarray(pixels(scene))
    shown = _KINDS[kind](scene, level - 1, np.random.default_rng([seed, level]))
    return Pictures.fromarray(shown.clip(0, 255).astype(np.uint8))
