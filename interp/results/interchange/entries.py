"""What a score file of another project says, before it is laid on a model's heads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from interp.errors import HeadError, InputError
from interp_hooks.heads import Head

#: (layer, head) or (layer, key/value head)
Cell = tuple[int, int]
#: no model has more layers, or heads in one; a larger index is a slip, and would fill the memory
LIMIT = 4096


@dataclass(frozen=True)
class Entries:
    """The numbers of one score file.

    Args:
        format: the name of the format.
        score: what the score is called where nobody says otherwise.
        values: (layer, head) → its number; what is not there was not measured, but see `listed`.
        samples: (layer, head) → its number in each sample, where the file holds them.
        grain: "head", or "kv_head" where the second index counts key/value heads.
        complete: whether the format has a number for every head of its model.
        listed: whether the file names heads and no numbers: 1 for those named, 0 for all others.
        said: what else the file says (the model, its trials, its settings).
        notes: sentences that belong beside the numbers.
    """

    format: str
    score: str
    values: Mapping[Cell, float]
    samples: Mapping[Cell, tuple[float, ...]] = field(default_factory=dict)
    grain: str = "head"
    complete: bool = False
    listed: bool = False
    said: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def box(self) -> Cell:
        """(layers, heads) of the smallest grid that holds all its cells."""
        return (
            max((layer for layer, _ in self.values), default=-1) + 1,
            max((head for _, head in self.values), default=-1) + 1,
        )

    @property
    def sparse(self) -> bool:
        """Whether it is a list, or names fewer than half the heads of its own grid: such a file
        does not say how large its model is."""
        layers, heads = self.box
        return self.listed or 2 * len(self.values) < layers * heads


def number(value: Any, where: str) -> float:
    """A finite float of a file. Raises `InputError`, for NaN and infinities too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where} has {_short(value)} where a number belongs.")
    try:
        plain = float(value)
    except OverflowError:
        plain = math.inf
    if not math.isfinite(plain):
        raise InputError(f"{where} has {_short(value)}, which is no score; leave the head out.")
    return plain


def index(value: Any, what: str) -> int:
    """A layer or head of a file, from 0. Raises `InputError`."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{_short(value)} is no {what}: these are whole numbers from 0.")
    if value >= LIMIT:
        raise InputError(f"No model has a {what} {_short(value)}; the file is not of heads.")
    return value


def cell(written: Any) -> Cell:
    """(layer, head) of "16-19", "L16H19", [16, 19], …. Raises `InputError`."""
    if isinstance(written, list | tuple) and len(written) == 2:
        return index(written[0], "layer"), index(written[1], "head")
    try:
        head = Head.parse(written) if isinstance(written, str) and len(written) < 40 else None
    except (HeadError, ValueError):
        head = None
    if head is None or head.tower:
        raise InputError(f'{_short(written)} is not a head, like "16-19" or [16, 19].')
    return index(head.layer, "layer"), index(head.head, "head")


def once(cells: Iterable[tuple[Cell, Any]]) -> dict[Cell, Any]:
    """The pairs as a dict. Raises `InputError` for a head that is there twice."""
    found: dict[Cell, Any] = {}
    for place, value in cells:
        if place in found:
            raise InputError(f"Head {place[0]}-{place[1]} is there twice.")
        found[place] = value
    return found


def is_cell_name(written: Any) -> bool:
    """Whether it is written as a head, even as one that no model has."""
    if isinstance(written, str):
        try:
            return len(written) < 40 and not Head.parse(written).tower
        except (HeadError, ValueError):
            return False
    return isinstance(written, list) and len(written) == 2 and all(map(_is_whole, written))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:37]}…"
