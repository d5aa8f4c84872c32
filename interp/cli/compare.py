"""`interp compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from interp.cli import common
from interp.cli.as_json import emit, records
from interp.cli.common import note, out

if TYPE_CHECKING:
    import pandas as pd

    from interp.atlas import Atlas

SIDE = "Folder of a scan, or a score file (Retrieval_Head, LOCOS, DuoAttention, PASTA, …)."


def compare(
    first: Annotated[Path, typer.Argument(help=SIDE, metavar="A")],
    second: Annotated[Path, typer.Argument(help=SIDE, metavar="B")],
    score: Annotated[
        str | None, typer.Option(help="Only this score of A; against the one of B's file.")
    ] = None,
    k: Annotated[int, typer.Option("--top", min=1, help="How many strongest heads.")] = 10,
    group: Annotated[
        str | None,
        typer.Option(help="mean or max: compare key/value heads, each from its query heads."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="LAYERSxHEADS or LAYERSxHEADSxKVHEADS of the model, where both are files.",
        ),
    ] = None,
    seed: common.SeedOption = 0,
    report: Annotated[
        Path | None, typer.Option(help="Write A's report, with the agreement, into this file.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print an object as JSON: both models, and a record a score."),
    ] = False,
) -> None:
    """Compare two sets of scores of models of one shape: do they rank the heads alike?"""
    import interp

    a, b = _read(first, shape), _read(second, shape)
    short = first.resolve().name != second.resolve().name
    both = tuple(
        f"{atlas.model} ({path.resolve().name if short else path})"
        for atlas, path in ((a, first), (b, second))
    )
    compared = interp.compare(a, b, score, k=k, group=group, seed=seed)
    if as_json:
        notes = [compared.attrs.get("inputs"), *dict.fromkeys([*a.notes, *b.notes])]
        emit(
            {
                "models": [a.model, b.model],
                "scores": records(compared),
                "notes": [n for n in notes if n],
            }
        )
        if report is not None:
            _report(report, a, b, score, k, group, seed, both)
        return
    console = out()
    for atlas, path in ((a, first), (b, second)):
        console.print(Text.assemble((f"{path}: ", "dim"), common.about_line(atlas)), soft_wrap=True)
    console.print(_table(compared, k))
    for row in compared.itertuples():
        if row.remark:
            console.print(Text(f"{row.score}: {row.remark}"), soft_wrap=True)
    note(
        "Spearman's ρ and Kendall's τ over heads: 1 is the same order. Overlap: strongest heads "
        "that both name; by chance: of as many random heads, and p, how often they share as many. "
        "Brackets: 95 % bootstrap intervals."
    )
    if "inputs" in compared.attrs:
        console.print(Text(compared.attrs["inputs"], style="yellow"), soft_wrap=True)
    for remark in dict.fromkeys([*a.notes, *b.notes]):
        note(remark)
    only = sorted(set(a.scores) ^ set(b.scores))
    if only and not any(" ~ " in name for name in compared["score"]):
        note(f"In one of them only: {', '.join(only)}.")
    if report is not None:
        _report(report, a, b, score, k, group, seed, both)


def _report(
    report: Path,
    a: Atlas,
    b: Atlas,
    score: str | None,
    k: int,
    group: str | None,
    seed: int,
    names: tuple[str, ...],
) -> None:
    first, second = names
    page = a.report_against(report, b, score, k=k, group=group, seed=seed, names=(first, second))
    note(f"Report: {page}")


def _read(path: Path, shape: str | None) -> Atlas:
    """One side; `shape` is for files, which don't say how large the model is."""
    from interp.atlas import Atlas
    from interp.results.interchange.alignment import gridless, parse_shape

    atlas = Atlas.read(path)
    return Atlas.read(path, parse_shape(shape)) if shape and gridless(atlas) else atlas


def _table(compared: pd.DataFrame, k: int) -> common.Table:
    """A row a score; the intervals where the terminal is wide enough for them."""
    from interp.report.comparison_section import chance, ranged, share

    wide = out().width >= 110
    names = (
        "score",
        "Spearman",
        "Kendall",
        "heads",
        f"top-{k} overlap",
        "by chance",
        "p of overlap",
    )
    table = common.table(*names, right=names[1:])
    for row in compared.to_dict("records"):
        ends = [
            (row[f"{name}_low"], row[f"{name}_high"]) if wide else (None, None)
            for name in ("spearman", "kendall", "overlap")
        ]
        overlap = share(row[f"top{k}_overlap"], *ends[2])
        table.add_row(
            Text(row["score"], style="bold"),
            ranged(row["spearman"], *ends[0]),
            ranged(row["kendall"], *ends[1]),
            str(row["heads"]),
            overlap if row["k"] == k else f"{overlap} of {row['k']}",
            share(row["overlap_expected"]),
            chance(row["overlap_p"]),
        )
    return table
