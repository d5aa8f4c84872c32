"""One score on the page: its heat maps, its strongest heads and how it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.report.heatmap import number, of_score, to_outline
from interp.report.section import plotable
from interp.results.places import noun

if TYPE_CHECKING:
    from interp.results.head_table import About, HeadTable

#: heads listed and outlined
TOP = 10
#: a figure narrower than this keeps its width, a wider one fills the page
_FULL_WIDTH = 900
#: a figure up to this wide has its table of heads beside it, a wider one above it
_BESIDE = 700


@dataclass(frozen=True)
class HeatMap:
    """A figure's element: its id, its size in pixels (no `width`: as wide as the page), and what
    is said of it."""

    element: str
    height: int
    width: int | None
    label: str
    caption: str


@dataclass(frozen=True)
class Panel:
    """Heads of one tower and kind of attention: (head, value, standard error) strongest first.

    `noun`, `nouns`: what they are, by the score's grain. Without `heatmap` nothing was measured.
    `wide`: the table stands under the figure. `heading` is empty where the section has but this
    panel.
    """

    heading: str
    ranking: list[tuple[str, float, float | None]]
    heatmap: HeatMap | None = None
    wide: bool = False
    noun: str = "head"
    nouns: str = "heads"

    @property
    def has_error(self) -> bool:
        """True where some value has a standard error."""
        return any(error is not None for _, _, error in self.ranking)


@dataclass(frozen=True)
class ScoreSection:
    """A score's part of the page; no panels where it was not measured in any head."""

    score: str
    anchor: str
    about: About
    notes: list[str]
    panels: list[Panel]
    threshold: str
    measured: str
    figures: Mapping[str, Any]


def of(atlas: HeadTable, score: str) -> ScoreSection:
    """The section of `score`."""
    figures: dict[str, Any] = {}
    measured = bool(np.isfinite(atlas.frame[score]).any())
    pairs = atlas.panels(score) if measured else []
    several = len(pairs) > 1 or len(atlas.towers) > 1
    panels = [
        _panel(atlas, score, tower, kind, f"{anchor(score)}-{n}", several, figures)
        for n, (tower, kind) in enumerate(pairs)
    ]
    return ScoreSection(
        score,
        anchor(score),
        atlas.about(score),
        [note for note in atlas.notes if note.startswith(f"{score}:")],
        panels,
        _threshold(atlas, score),
        str(atlas.measured(score)),
        figures,
    )


def anchor(score: str) -> str:
    """An element id. Scores that differ only in odd characters stay apart by their code points."""
    return "score-" + re.sub(r"[^A-Za-z0-9_-]", lambda m: f"_{ord(m[0]):x}_", score)


def _panel(
    atlas: HeadTable,
    score: str,
    tower: str,
    kind: str,
    element: str,
    several: bool,
    figures: dict[str, Any],
) -> Panel:
    """Heads of one tower and kind. The figure is added to `figures`."""
    grain = atlas.about(score).grain
    one, many = noun(grain), noun(grain, several=True)
    names = (f"{tower} tower" if tower else "", "cross-attention" if kind == "cross" else "")
    where = ", ".join(filter(None, names)) if several else ""
    heading = where[:1].upper() + where[1:]
    ranking = [(str(h), v, e) for h, v, e in atlas.ranking(score, TOP, tower, kind)]
    if not ranking:
        return Panel(heading, ranking, noun=one, nouns=many)
    figure = of_score(atlas, score, tower, kind, TOP)
    width = figure.layout.width
    figures[element] = plotable(figure)
    values = atlas.cells(score, tower, kind, grain)
    n_layers, n_heads = values.shape
    size = f"{n_layers} layers" + ("" if grain == "layer" else f" and {n_heads} {many}")
    marked = to_outline(atlas, score, TOP, tower, kind)
    outlined = marked.text if marked.places else ""
    best = ", ".join(f"{head} {number(value)}" for head, value, _ in ranking[:3])
    masked = int(np.ma.getmaskarray(values).sum())
    heatmap = HeatMap(
        element,
        int(figure.layout.height),
        int(width) if width is not None and width < _FULL_WIDTH else None,
        f"Heat map of {atlas.about(score).title} over {size}; highest: {best}.",
        "Layer 0 at the top."
        + (f" {outlined[:1].upper()}{outlined[1:]}." if outlined else "")
        + (f" Grey: not measured ({masked} {many})." if masked else ""),
    )
    return Panel(heading, ranking, heatmap, width is None or width > _BESIDE, one, many)


def _threshold(atlas: HeadTable, score: str) -> str:
    threshold, above = atlas.about(score).threshold, atlas.above(score)
    if threshold is None:
        return ""
    grain, measured = atlas.about(score).grain, str(atlas.measured(score))
    of = f"{len(atlas.ranking(score))} {noun(grain, several=True)}"
    count = "" if above is None else f"; {above} of {of} reach it"
    count += f" at {measured}" if count and measured else ""
    return f"a {noun(grain)} counts from {number(threshold)}{count}"
