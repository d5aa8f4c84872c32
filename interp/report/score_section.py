"""One score on the page: how it is read, and what it was measured on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from interp.report.heatmap import number
from interp.results.places import noun

if TYPE_CHECKING:
    from interp.results.head_table import About, HeadTable


@dataclass(frozen=True)
class ScoreSection:
    """What the page says of a score; `empty` where it was not measured in any head."""

    score: str
    anchor: str
    about: About
    notes: list[str]
    threshold: str
    measured: str
    empty: bool


def of(atlas: HeadTable, score: str) -> ScoreSection:
    """The section of `score`."""
    return ScoreSection(
        score,
        anchor(score),
        atlas.about(score),
        [note for note in atlas.notes if note.startswith(f"{score}:")],
        _threshold(atlas, score),
        str(atlas.measured(score)),
        not bool(np.isfinite(atlas.frame[score]).any()),
    )


def anchor(score: str) -> str:
    """An element id. Scores that differ only in odd characters stay apart by their code points."""
    return "about-" + re.sub(r"[^A-Za-z0-9_-]", lambda m: f"_{ord(m[0]):x}_", score)


def _threshold(atlas: HeadTable, score: str) -> str:
    threshold, above = atlas.about(score).threshold, atlas.above(score)
    if threshold is None:
        return ""
    grain, measured = atlas.about(score).grain, str(atlas.measured(score))
    of = f"{len(atlas.ranking(score))} {noun(grain, several=True)}"
    count = "" if above is None else f"; {above} of {of} reach it"
    count += f" at {measured}" if count and measured else ""
    return f"a {noun(grain)} counts from {number(threshold)}{count}"
