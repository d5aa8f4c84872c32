"""What a circuit search gives: an atlas with the method's column, the edges, and the task it is
about."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from interp.atlas import Atlas
from interp.circuits.drawing.graph import figure
from interp.circuits.drawing.section import sections
from interp.results.circuit_table import CircuitTable

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.circuits.judging.faithfulness import Faithfulness
    from interp.circuits.known.truth import Truth
    from interp.report.section import Section


class Circuit(CircuitTable, Atlas):
    """Scores of all heads for one task by one method, with its graph, plots and report.

    Its arguments are those of `CircuitTable`.
    """

    def plot(
        self, score: str = "", tower: str = "", kind: str | None = None, top: int = 10
    ) -> go.Figure:
        """As `Atlas.plot`; without a score, the method's own."""
        return super().plot(score or self.column, tower, kind, top)

    def graph(self, heads: int = 12, edges: int = 40) -> go.Figure:
        """Heads by layer, the strongest ones named, with the strongest edges between them."""
        return figure(self, heads, edges)

    def heading(self) -> tuple[str, str]:
        return "Circuit of attention heads", f"Circuit for {self.task} in {self.model}"

    def sections(
        self, truth: Truth | None = None, faithfulness: Faithfulness | None = None
    ) -> list[Section]:
        """What a report tells before the scores: the task, the graph, the strongest edges; how far
        the circuit agrees with one that is known, and how faithful it is, where these are given.
        Raises `InputError` for a truth of another model's shape."""
        return sections(self, truth, faithfulness)

    def report(
        self,
        path: str | os.PathLike[str],
        truth: Truth | None = None,
        faithfulness: Faithfulness | None = None,
    ) -> Path:
        """As `Atlas.report`, with what `sections` tells first."""
        return self._write(path, self.sections(truth, faithfulness))

    def __repr__(self) -> str:
        strongest = ", ".join(str(h) for h in self.heads(5))
        return f"Circuit({self.model}, {self.task} by {self.search.method}: {strongest}, …)"
