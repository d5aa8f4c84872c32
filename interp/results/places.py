"""Where a score belongs: a head, a key/value head or a layer, and how each is written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interp.errors import InputError
from interp_hooks.heads import Head

if TYPE_CHECKING:
    import pandas as pd

#: grain of a score → (the column that tells its places within a layer, the noun, its plural)
_GRAINS: dict[str, tuple[str | None, str, str]] = {
    "head": ("head", "head", "heads"),
    "kv_head": ("kv_head", "key/value head", "key/value heads"),
    "layer": (None, "layer", "layers"),
}
GRAINS = tuple(_GRAINS)
_KV = re.compile(r"(?:(?P<tower>[A-Za-z_]+)\.)?L(?P<layer>\d+)(?:KV(?P<kv>\d+))?")


@dataclass(frozen=True, order=True)
class KVHead:
    """Key/value head `kv_head` of layer `layer` in `tower`, shared by a group of query heads.

    Prints ``L3KV1``.

    Example:
        >>> from interp.results.places import KVHead
        >>> KVHead(3, 1)
        L3KV1
    """

    layer: int
    kv_head: int
    tower: str = ""

    def __str__(self) -> str:
        return f"{self.tower + '.' if self.tower else ''}L{self.layer}KV{self.kv_head}"

    __repr__ = __str__


@dataclass(frozen=True, order=True)
class Layer:
    """Layer `layer` of `tower`. Prints ``L12``.

    Example:
        >>> from interp.results.places import Layer
        >>> Layer(12)
        L12
    """

    layer: int
    tower: str = ""

    def __str__(self) -> str:
        return f"{self.tower + '.' if self.tower else ''}L{self.layer}"

    __repr__ = __str__


Place = Head | KVHead | Layer


def noun(grain: str, several: bool = False) -> str:
    """What the places of a grain are called: "head", "key/value heads", …"""
    _, one, many = _GRAINS[grain]
    return many if several else one


def column(grain: str) -> str | None:
    """The column of a frame that tells the places of a layer apart; None for whole layers."""
    return _GRAINS[grain][0]


def check_grain(grain: str) -> None:
    """Raise `InputError` for a grain that is none."""
    if grain not in _GRAINS:
        raise InputError(f"A score's grain is {', '.join(GRAINS)}, and not {grain!r}.")


def index_of(place: Place) -> int:
    """Which of its layer's places it is: 0 for a whole layer."""
    if isinstance(place, Layer):
        return 0
    return place.kv_head if isinstance(place, KVHead) else place.head


def place(grain: str, layer: int, index: int, tower: str = "") -> Place:
    """The place of a grain in a row; `index` counts heads or key/value heads, and says nothing of a
    layer."""
    if grain == "layer":
        return Layer(layer, tower)
    return KVHead(layer, index, tower) if grain == "kv_head" else Head(layer, index, tower)


def parse(written: object) -> Place:
    """A place as it is written: "L12" a layer, "L3KV1" a key/value head, else as `Head.parse`."""
    if isinstance(written, KVHead | Layer):
        return written
    match = _KV.fullmatch(written.strip()) if isinstance(written, str) else None
    if match is None:
        return Head.parse(written)  # type: ignore[arg-type]
    layer, tower = int(match["layer"]), match["tower"] or ""
    return Layer(layer, tower) if match["kv"] is None else KVHead(layer, int(match["kv"]), tower)


def places(frame: pd.DataFrame, score: str, grain: str) -> pd.DataFrame:
    """The rows in which a score was measured, one a place.

    A frame has a row a head, so a layer's value stands in it once a head; the row of its first head
    is kept.
    """
    rows = frame[frame[score].notna()]
    within = [c for c in (column(grain),) if c is not None]
    return rows.drop_duplicates(["tower", "kind", "layer", *within])
