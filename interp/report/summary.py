"""The strongest heads of every score: the page's first table, and what Jupyter shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from interp.report.heatmap import number
from interp.report.score_section import anchor
from interp.report.templating import rendered

if TYPE_CHECKING:
    from interp.results.head_table import HeadTable

#: heads in a row
TOP = 5


@dataclass(frozen=True)
class Row:
    """A score's line of the table: where it is told of, its name, (head, value) strongest first,
    and how many heads reach its threshold."""

    anchor: str
    title: str
    heads: list[tuple[str, float]]
    count: str


def rows(atlas: HeadTable) -> list[Row]:
    """A row a score, in the order they were measured."""
    return [
        Row(
            anchor(score),
            atlas.about(score).title,
            [(str(head), value) for head, value, _ in atlas.ranking(score, TOP)],
            counted(atlas, score),
        )
        for score in atlas.scores
    ]


def hint(atlas: HeadTable) -> str:
    """How heads are written."""
    towers = [t for t in atlas.towers if t]
    of = f" of the {towers[-1]} tower" if len(atlas.towers) > 1 else ""
    written = f"{towers[-1]}.L5H1" if len(atlas.towers) > 1 else "L5H1"
    grains = {atlas.about(score).grain for score in atlas.scores}
    others = [
        *(["L5KV1 its key/value head 1"] if "kv_head" in grains else []),
        *(["L5 the layer"] if "layer" in grains else []),
    ]
    more = f" ({', '.join(others)})" if others else ""
    return f"{written} is head 1 of layer 5{of}{more}; all count from 0. Higher is stronger."


def summary(atlas: HeadTable) -> str:
    """What Jupyter shows of an atlas: its name, its notes and the table of top heads."""
    return rendered("summary.html.j2", atlas=atlas, rows=rows(atlas))


def counted(atlas: HeadTable, score: str) -> str:
    """How many heads reach a score's threshold and on what it was measured, "85 ≥ 0.30 at 1,024
    tokens, 16 samples"; empty without a threshold."""
    above, measured = atlas.above(score), str(atlas.measured(score))
    if above is None:
        return ""
    count = f"{above} ≥ {number(atlas.about(score).threshold or 0.0)}"
    return f"{count} at {measured}" if measured else count
