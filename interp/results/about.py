"""How a score is read, as data that is saved with its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from interp.results.places import check_grain


@dataclass(frozen=True)
class About:
    """How a score is read: what `interp.scores.Score` says of it, as jsonable data."""

    title: str
    reading: str = ""
    formula: str = ""
    citation: str = ""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    #: "head", "kv_head" or "layer": what one value belongs to
    grain: str = "head"
    #: what a head that reaches the threshold is called, "induction head"; "" for nothing
    role: str = ""

    def __post_init__(self) -> None:
        check_grain(self.grain)
