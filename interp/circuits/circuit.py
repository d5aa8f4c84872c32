"""What a circuit search gives: an atlas with the method's column, the edges, and the task it is
about."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from interp.atlas import Atlas
from interp.circuits.drawing.graph import figure
from interp.circuits.drawing.section import effect_heading, sections, signed
from interp.report.heatmap import within
from interp.results.circuit_table import CircuitTable
from interp.support.html import block

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.circuits.judging.curves import Faithfulness
    from interp.circuits.known.truth import Truth
    from interp.report.section import Section


#: heads that Jupyter shows
TOP = 10


class Circuit(CircuitTable, Atlas):
    """Scores of all heads for one task by one method, with its graph, plots and report.

    Its arguments are those of `CircuitTable`; `interp.circuits.find` makes one.

    Example:
        >>> circuit = interp.circuits.find(model, "ioi", "head_ablation", n=8)
        >>> circuit.column, len(circuit.heads(3))
        ('head_ablation', 3)
    """

    def plot(
        self, score: str = "", tower: str = "", kind: str | None = None, top: int = 10
    ) -> go.Figure:
        """Heat map as `Atlas.plot`; without a score, of the method's own.

        Example:
            >>> circuit.plot().data[0].type
            'heatmap'
        """
        return super().plot(score or self.column, tower, kind, top)

    def graph(self, heads: int = 12, edges: int = 40) -> go.Figure:
        """Graph of the circuit: heads by layer, the strongest ones named, and the strongest edges.

        Args:
            heads: how many are named.
            edges: how many are drawn.

        Example:
            >>> len(circuit.graph(heads=4).data) > 0
            True
        """
        return figure(self, heads, edges)

    def heading(self) -> tuple[str, str]:
        """What a report is of, and its title."""
        return "Circuit of attention heads", f"Circuit for {self.task} in {self.model}"

    def sections(
        self, truth: Truth | None = None, faithfulness: Faithfulness | None = None
    ) -> list[Section]:
        """What a report tells before the scores: the task, the graph, the strongest edges.

        And how far the circuit agrees with one that is known, and how faithful it is, where these
        are given.

        Raises:
            InputError: a truth of another model's shape.
        """
        return sections(self, truth, faithfulness)

    def report(
        self,
        path: str | os.PathLike[str],
        truth: Truth | None = None,
        faithfulness: Faithfulness | None = None,
    ) -> Path:
        """Writes a self-contained HTML report, as `Atlas.report`, with what `sections` tells first.

        Args:
            path: the file.
            truth: a known circuit to compare with.
            faithfulness: of this circuit.

        Returns:
            Its path.

        Raises:
            InputError: a truth of another model's shape.
            OutputError: it can't be written.

        Example:
            >>> circuit.report("circuit.html").name
            'circuit.html'
        """
        return self._write(path, self.sections(truth, faithfulness))

    def _repr_html_(self) -> str:
        search, ranked = self.search, self.ranked(TOP)
        effect = effect_heading(ranked)
        rows = [
            [r.head, within(f"{r.score:.3f}", r.ends), *([signed(r)] if effect else [])]
            for r in ranked
        ]
        facts = {
            "prompts": f"{search.n} pairs",
            "accuracy": search.accuracy,
            search.metric: f"{search.clean.mean:.3g}, corrupted {search.corrupted.mean:.3g}",
            "edges": f"{len(self.edges):,}" if len(self.edges) else "",
        }
        return block(
            f"Circuit for {self.task} in {self.model}",
            f"by {search.method}",
            facts,
            ["head", "score", *([effect] if effect else [])],
            rows,
            [self.about(self.column).reading, *self.notes],
        )

    def __repr__(self) -> str:
        strongest = ", ".join(str(h) for h in self.heads(5))
        return f"Circuit({self.model}, {self.task} by {self.search.method}: {strongest}, …)"
