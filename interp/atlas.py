"""What a scan gives: every score of every head, where it came from, and what to do with it."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import UnknownNameError
from interp.report import heatmap, massive_section
from interp.results import massive
from interp.results.comparison import compare
from interp.results.head_table import About, HeadTable
from interp.results.massive import MassiveActivations
from interp.scores import catalogue as scores
from interp.support.files import check_writable, write_atomic

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from typing_extensions import Self

    from interp.report.section import Section

#: from so many times the median on an activation is massive by Sun et al.; below, secondary
FULL = 1000.0
#: how long a report takes, about
REPORT_SECONDS = 2.0


class Atlas(HeadTable):
    """Scores of all heads of a model: a `HeadTable` with plots, a report and comparisons.

    Its arguments are those of `HeadTable`; how a score is read is looked up in `interp.scores`
    where the table does not say. `interp.scan_heads` makes one.

    Example:
        >>> scan = dict(context=64, samples=2, progress=False)
        >>> atlas = interp.scan_heads(model, ["previous_token"], **scan)
        >>> atlas.top("previous_token", 2)
        [L0H0, L0H2]
    """

    #: the massive activations of the texts, where a scan listed them
    massive: MassiveActivations | None = None

    def look_up(self, score: str) -> About:
        """From the registry; a score that is not registered here keeps its name and nothing
        more."""
        try:
            entry = scores.get(score)
        except UnknownNameError:
            return super().look_up(score)
        said: dict[str, Any] = {
            f.name: getattr(entry, f.name) for f in fields(About) if hasattr(entry, f.name)
        }
        return About(**{"title": score, **said})

    def compare(self, other: HeadTable) -> pd.DataFrame:
        """The agreement of two atlases, a row a shared score.

        See `interp.results.comparison.compare`.

        Args:
            other: an atlas of a model of the same shape.

        Raises:
            InputError: models of different shapes, or no shared score.

        Example:
            >>> list(atlas.compare(atlas)["score"])
            ['previous_token']
        """
        return compare(self, other)

    def plot(
        self, score: str, tower: str = "", kind: str | None = None, top: int = 10
    ) -> go.Figure:
        """Heat map of a score: a column a head, a row a layer, layer 0 at the top.

        Args:
            score: its name.
            tower: "" for the only tower in which it was measured.
            kind: None for self-attention where there is any.
            top: how many heads are outlined, the highest.

        Returns:
            A Plotly figure.

        Raises:
            UnknownNameError: a score that is not there.
            InputError: a tower or kind that is not there.

        Example:
            >>> atlas.plot("previous_token").data[0].type
            'heatmap'
        """
        return heatmap.of_score(self, score, tower, kind, top)

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Writes a self-contained HTML report (no network needed to read it).

        Args:
            path: the file.

        Returns:
            Its path.

        Raises:
            OutputError: it can't be written.

        Example:
            >>> atlas.report("atlas.html").name
            'atlas.html'
        """
        return self._write(path, self.sections())

    def sections(self) -> list[Section]:
        """What a report tells before the scores: of a plain atlas its massive activations, where
        they were listed."""
        return [] if self.massive is None else [massive_section.of(self.massive, FULL)]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes what `HeadTable.save` does, and the massive activations where they were listed.

        Example:
            >>> interp.Atlas.load(atlas.save("scan")).massive is None
            True
        """
        target = super().save(folder)
        if self.massive is not None:
            self.massive.save(target)
        else:  # those of an earlier scan into this folder are not this one's
            for name in (massive.HEAD, massive.ROWS):
                (target / name).unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """What `save` wrote, read back.

        Example:
            >>> interp.Atlas.load(atlas.save("scan")).scores
            ['previous_token']
        """
        atlas = super().load(folder)
        if (Path(folder) / massive.HEAD).is_file():
            atlas.massive = MassiveActivations.load(folder)
        return atlas

    def heading(self) -> tuple[str, str]:
        """What a report is of, and its title."""
        return "Atlas of attention heads", self.model

    def _repr_html_(self) -> str:
        from interp.report.summary import summary

        return summary(self)

    def _write(self, path: str | os.PathLike[str], first: list[Section]) -> Path:
        from interp.report.page import render  # Jinja2, where a page is made

        target = Path(path)
        check_writable(target.parent)
        write_atomic(target, render(self, self.heading(), first).encode())
        return target
