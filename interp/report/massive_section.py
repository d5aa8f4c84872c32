"""Massive activations on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.report.heatmap import number
from interp.report.section import Section

if TYPE_CHECKING:
    from interp.results.massive import MassiveActivations

#: rows of the table; the file has all
TOP = 20


def of(massive: MassiveActivations, full: float) -> Section:
    """The section of a table; from `full` × the median on an activation is massive, the others
    are secondary."""
    summary = massive.summary()
    rows = [
        [
            r.dimension,
            r.position,
            r.token,
            r.layers,
            r.samples,
            number(r.value),
            r.layer,
            f"{r.ratio:,.0f}",
            "massive" if r.ratio > full else "secondary",
        ]
        for r in summary.head(TOP).itertuples()
    ]
    headings = ["Dimension", "Position", "Token", "Layers", "Samples", "Largest value"]
    headings += ["in layer", "× median", "Kind"]
    table = dict(
        headings=headings,
        rows=rows,
        caption=f"The {len(rows)} largest of {len(summary)}, by dimension, position and token",
    )
    values = dict(rule=massive.rule, full=f"{full:,g}", table=table, any=bool(rows))
    return Section("massive", "Massive activations", "massive.html.j2", values, after=True)
