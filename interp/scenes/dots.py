"""Pictures of dots: one to six discs of one colour on a grid of nine cells.

Small enough for a model that draws, and plain enough that what it drew can be counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.errors import InputError

#: colours by name, red, green and blue from 0 to 1; their order is that of classes
DOT_COLORS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.15, 0.75, 0.2),
    "blue": (0.2, 0.3, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.65, 0.2, 0.8),
    "white": (0.97, 0.97, 0.97),
}
#: pixels a side, of a picture and of a cell
SIDE, _CELL = 24, 8
_BACKGROUND, _TEXTURE = 0.35, 0.04
#: a dot's radius in pixels, and the share of its middle that must be of a colour to be read
_RADIUS, _MIDDLE = 3.1, 0.6
#: largest distance, in units of colour, of what is read as a colour
_NEAR = 0.35


@dataclass(frozen=True)
class Dots:
    """Dots of one colour in some of the cells 0 … 8, row by row.

    Example:
        >>> interp.scenes.dots(0)
        Dots(color='green', cells=(3, 4, 5, 7, 8), seed=0)
    """

    color: str
    cells: tuple[int, ...]
    seed: int = 0


@dataclass(frozen=True)
class Read:
    """What a picture shows: `cells` with a dot, and the colour that most of them have (None: none).

    `colors` is the colour of each cell, None where it is none of the six.

    Example:
        >>> drawn = interp.scenes.draw_dots(interp.scenes.dots(0))
        >>> interp.scenes.read_dots(drawn).cells
        (3, 4, 5, 7, 8)
    """

    colors: tuple[str | None, ...]

    @property
    def cells(self) -> tuple[int, ...]:
        """The cells with a dot."""
        return tuple(i for i, c in enumerate(self.colors) if c is not None)

    @property
    def color(self) -> str | None:
        """The colour of most dots."""
        there = [c for c in self.colors if c is not None]
        return max(sorted(set(there)), key=there.count) if there else None


def dots(seed: int) -> Dots:
    """One to six dots drawn from `seed`: each colour, count and place alike.

    Example:
        >>> interp.scenes.dots(3) == interp.scenes.dots(3)
        True
    """
    rng = np.random.default_rng([4, seed])
    count = int(rng.integers(1, 7))
    cells = tuple(sorted(int(c) for c in rng.choice(9, count, replace=False)))
    return Dots(str(rng.choice(list(DOT_COLORS))), cells, seed)


def draw_dots(shown: Dots) -> np.ndarray:
    """(3, 24, 24) float32 in −1 … 1: the dots on a grey, slightly uneven ground.

    Example:
        >>> interp.scenes.draw_dots(interp.scenes.dots(0)).shape
        (3, 24, 24)
    """
    rng = np.random.default_rng([5, shown.seed])
    picture = _BACKGROUND + rng.normal(0, _TEXTURE, (1, SIDE, SIDE)).repeat(3, 0)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    for cell in shown.cells:
        middle = (np.array([cell // 3, cell % 3]) + 0.5) * _CELL + rng.uniform(-0.5, 0.5, 2)
        distance = np.hypot(y - middle[0], x - middle[1])
        cover = np.clip(_RADIUS + 0.5 - distance, 0, 1)  # smooth edges
        color = np.array(DOT_COLORS[shown.color])[:, None, None]
        picture = picture * (1 - cover) + color * cover
    drawn: np.ndarray = (picture * 2 - 1).clip(-1, 1).astype(np.float32)
    return drawn


def read_dots(picture: np.ndarray) -> Read:
    """What a picture (3, 24, 24) in −1 … 1 shows: a cell has a dot where its middle is of a colour.

    Raises:
        InputError: a picture of another shape.

    Example:
        >>> interp.scenes.read_dots(np.zeros((3, 24, 24))).color is None
        True
    """
    if np.shape(picture) != (3, SIDE, SIDE):
        raise InputError(f"A picture of dots is (3, {SIDE}, {SIDE}), not {np.shape(picture)}.")
    pixels = (np.asarray(picture, np.float64) + 1) / 2
    names, known = list(DOT_COLORS), np.array([*DOT_COLORS.values(), (_BACKGROUND,) * 3])
    found: list[str | None] = []
    for cell in range(9):
        top, left = cell // 3 * _CELL + 2, cell % 3 * _CELL + 2
        middle = pixels[:, top : top + 4, left : left + 4].reshape(3, -1).T  # (16, 3)
        distance = np.linalg.norm(middle[:, None] - known, axis=-1)  # (16, colours + ground)
        nearest = np.where(distance.min(1) < _NEAR, distance.argmin(1), len(names))
        share = np.bincount(nearest, minlength=len(known))[: len(names)] / 16
        found.append(names[int(share.argmax())] if share.max() >= _MIDDLE else None)
    return Read(tuple(found))
