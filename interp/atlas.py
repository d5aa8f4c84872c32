"""What a scan gives: every score of every head, where it came from, and what to do with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import UnknownNameError
from interp.report import comparison_section, heatmap, massive_section
from interp.report.card import Card, cards
from interp.results import change, comparison, evidence, massive, samples
from interp.results.evidence import Evidence
from interp.results.head_table import About, HeadTable
from interp.results.interchange import alignment, catalogue, reading, tables, writing
from interp.results.massive import MassiveActivations
from interp.scores import catalogue as scores
from interp.support.checked import path as checked_path
from interp.support.files import check_writable, write_atomic
from interp_hooks.heads import Head

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from typing_extensions import Self

    from interp.report.section import Section
    from interp_hooks.protocol import Model

#: from so many times the median on an activation is massive by Sun et al.; below, secondary
FULL = 1000.0
#: heads that the page of a comparison lists as having moved most
MOVED = 15
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
    #: passages, OV directions and partners of each head, where a scan gathered them
    evidence: Evidence | None = None

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

    def compare(
        self,
        other: HeadTable | str | os.PathLike[str],
        score: str | None = None,
        *,
        k: int = 10,
        group: str | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """The agreement of two atlases, a row a shared score; see `interp.compare`.

        Args:
            other: an atlas of a model of the same shape, its folder, or a score file.
            score, k, group, seed: as `interp.compare` takes them.

        Raises:
            InputError: models of different shapes, or no shared score.

        Example:
            >>> list(atlas.compare(atlas)["score"])
            ['previous_token']
        """
        return compare(self, other, score, k=k, group=group, seed=seed)

    def card(self, head: Any) -> Card:
        """All that is known of a head: roles with their reasons, scores, passages, partners.

        Args:
            head: in any spelling.

        Returns:
            A `Card`: it shows itself in Jupyter, and as text when printed.

        Raises:
            HeadError: a head that is not there.

        Example:
            >>> print(str(atlas.card("L0H2")).splitlines()[0])
            L0H2 of pocket-llama: previous-token head
        """
        kept = None if self.evidence is None else self.evidence.of(str(Head.parse(head)))
        return Card.of(self, Head.parse(head), kept)

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

    def report_against(
        self,
        path: str | os.PathLike[str],
        other: HeadTable | str | os.PathLike[str],
        score: str | None = None,
        *,
        k: int = 10,
        group: str | None = None,
        seed: int = 0,
        names: tuple[str, str] | None = None,
    ) -> Path:
        """Writes a page that holds this atlas against another: how far they agree, what moved.

        Its maps show each shared score in both, and the second less the first, the changes of
        scores of one unit on one scale.

        Args:
            path: the file.
            other: an atlas, its folder, or a score file.
            score, k, group, seed: as `interp.compare` takes them.
            names: what the two are called; their models and, of one model, the folder of `other`.

        Returns:
            The report's path.

        Raises:
            OutputError: it can't be written; and as `interp.compare`.

        Example:
            >>> atlas.report_against("both.html", atlas).name
            'both.html'
        """
        there = other if isinstance(other, HeadTable) else Atlas.read(other)
        compared = compare(self, there, score, k=k, group=group, seed=seed)
        first, second = alignment.aligned(self, there)
        pairs = [p for p in alignment.pairs(first, second, score) if group is None]
        shown = change.both(first, second, pairs) if pairs else None
        moves = [] if shown is None else change.moves(shown, change.names(pairs), MOVED)
        called = names or _called(self, there, other)
        section = comparison_section.of(compared, self, there, moves, called)
        heading = ("Two atlases compared", " and ".join(called))
        return self._write(path, [section, *self.sections()], heading, shown)

    def sections(self) -> list[Section]:
        """What a report tells before the scores: of a plain atlas its massive activations, where
        they were listed."""
        return [] if self.massive is None else [massive_section.of(self.massive, FULL)]

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        model: Model | HeadTable | Sequence[int] | None = None,
        *,
        score: str | None = None,
        format: str | None = None,
        grain: str | None = None,
        tower: str | None = None,
    ) -> Self:
        """The scores in a file of another project, or in the folder of a scan.

        Retrieval_Head's and LOCOS' JSON, DuoAttention's table (whose gates are of key/value heads),
        PASTA's lists of heads, and numbers a head in five other layouts are told apart by their
        content (`docs/usage.md` has the table). Without the model, the heads are those that the
        file names: then nothing says which of them share keys and values.

        Args:
            path: the file, a folder with DuoAttention's table, or what `save` wrote.
            model: whose heads they are: a loaded model, an atlas of it, or (layers, heads) or
                (layers, heads, key/value heads). A file of another size is refused.
            score: what the score is called; None for what the format calls it.
            format: its format (`interp.results.interchange.catalogue`); None for that of its
                content.
            grain: "head" or "kv_head", of a table of numbers that doesn't say it.
            tower: of a model of several towers, the one that the file is of.

        Raises:
            OutputError: it can't be read.
            InputError: it has no known format, a head twice, NaN, or is of another model.

        Example:
            >>> path = atlas.write_json("scores.json", "previous_token")
            >>> theirs = interp.Atlas.read(path, model, score="theirs")
            >>> bool((theirs["theirs"] == atlas["previous_token"]).all())
            True
        """
        file = checked_path(path, "A scan or a score file")
        if file.is_dir() and not (file / reading.TABLE).is_file():
            return cls.load(file)
        if file.name == "atlas.json" and (file.parent / "atlas.parquet").is_file():
            return cls.load(file.parent)
        entries = reading.read(file, format)
        if score is not None:
            entries = replace(entries, score=str(score))
        made = tables.table_of(entries, file.name, model, tower, grain)
        atlas = cls(made.frame, made.provenance, made.notes, made.about)
        atlas.samples = made.samples
        return atlas

    def write_json(
        self,
        path: str | os.PathLike[str],
        score: str | None = None,
        *,
        format: str = "retrieval_head",
        k: int | None = None,
        group: str | None = None,
        tower: str = "",
    ) -> Path:
        """Writes one score as a score file that other projects read, and `read` reads back.

        Heads that were not measured are left out. Where the samples are not known, as of a scan,
        each head has its one number.

        Args:
            path: the file.
            score: its name; None for the only one, or the one that the format is of.
            format: "retrieval_head" (HeadKV's too), "locos", "duo" (tab-separated, for scores of
                key/value heads), "pasta", "values", "nested", "ranked", "records" or "matrix".
            k: only the k strongest heads; for a list of them.
            group: "mean" or "max": key/value heads, each from its query heads.
            tower: as in `matrix`.

        Returns:
            Its path.

        Raises:
            InputError: the format can't hold the score; nothing was measured.
            UnknownNameError: there is no such score or format.
            OutputError: it can't be written.

        Example:
            >>> path = atlas.write_json("heads.json", "previous_token", format="pasta", k=2)
            >>> path.read_text().strip()
            '{"0": [0, 2]}'
        """
        chosen = catalogue.get(format)
        if score is None:
            score = chosen.score if len(self.scores) > 1 else "".join(self.scores)
        entries = tables.entries_of(self, score, tower, group=group)
        return writing.write(Path(path), entries, chosen, k)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes what `HeadTable.save` does, and the massive activations, the evidence and the
        numbers of each sample where there are any.

        Example:
            >>> atlas.save("scan").name
            'scan'
        """
        target = super().save(folder)
        if self.massive is not None:
            self.massive.save(target)
        else:  # those of an earlier scan into this folder are not this one's
            for name in (massive.HEAD, massive.ROWS):
                (target / name).unlink(missing_ok=True)
        if self.evidence is not None:
            self.evidence.save(target)
        else:
            (target / evidence.FILE).unlink(missing_ok=True)
        samples.save(target, self.samples)
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
        if (Path(folder) / evidence.FILE).is_file():
            atlas.evidence = Evidence.load(folder)
        atlas.samples = samples.load(Path(folder), atlas.frame)
        return atlas

    def heading(self) -> tuple[str, str]:
        """What a report is of, and its title."""
        return "Atlas of attention heads", self.model

    def _repr_html_(self) -> str:
        from interp.report.summary import summary

        return summary(self)

    def _write(
        self,
        path: str | os.PathLike[str],
        first: list[Section],
        heading: tuple[str, str] | None = None,
        shown: HeadTable | None = None,
    ) -> Path:
        """The page; `shown`: what its maps and table are of, this table unless said otherwise."""
        from interp.report.page import render  # Jinja2, where a page is made

        target = checked_path(path, "A report's file")
        check_writable(target.parent)
        known = cards(self, self.evidence) if self.query_heads_known else {}
        page = render(self, heading or self.heading(), first, known, shown)
        write_atomic(target, page.encode(errors="backslashreplace"))
        return target


def _called(one: HeadTable, two: HeadTable, other: Any) -> tuple[str, str]:
    """What the two sides of a comparison are called, apart where they are of one model."""
    if one.model != two.model:
        return one.model, two.model
    where = f" in {other}" if isinstance(other, str | os.PathLike) else ""
    return f"{one.model}, the first scan", f"the second{where}"


def compare(
    one: HeadTable | str | os.PathLike[str],
    other: HeadTable | str | os.PathLike[str],
    score: str | None = None,
    *,
    k: int = 10,
    group: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How far two sets of scores rank the heads alike, a row a shared score.

    Spearman's ρ and Kendall's τ_b over heads, and the share of the k strongest that both name, each
    with a 95 % bootstrap interval: over the samples where a file holds them, else over heads.
    Beside them the control: the overlap of as many random heads and the chance of one as large, and
    the chance of as large a ρ when heads are shuffled. Noise lowers rank correlations, so that of
    few samples an interval may lie below the number. `interp.results.comparison.compare` has the
    columns.

    A file that names no score of the other side is held against each of its scores ("sink ~
    listed"). A file without its model is laid on the heads of the other side.

    Args:
        one, other: atlases, folders of scans, or score files that `Atlas.read` takes.
        score: only this score of the first; with a file, this one against the file's.
        k: how many strongest heads. Where one side is a list of heads, as many as it names.
        group: "mean" or "max": query heads become key/value heads before they are compared, as they
            must against DuoAttention's gates.
        seed: of the resamples.

    Returns:
        A frame, a row a score.

    Raises:
        InputError: models of different sizes, no shared score, or query heads against key/value
            heads without `group`.
        UnknownNameError: the first has no such score.
        OutputError: a folder or file that can't be read.

    Example:
        >>> path = atlas.write_json("theirs.json", "previous_token")
        >>> round(interp.compare(atlas, path, "previous_token").spearman[0], 6)
        1.0
    """
    first, second = (
        side if isinstance(side, HeadTable) else Atlas.read(side) for side in (one, other)
    )
    first, second = alignment.aligned(first, second)
    pairs = alignment.pairs(first, second, score)
    if group is not None:
        first, second = (
            alignment.grouped(table, names, group)
            for table, names in zip((first, second), zip(*pairs, strict=True), strict=True)
        )
    return comparison.compare(first, second, pairs, k, seed)
