"""`interp compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from interp.cli import common
from interp.cli.common import note, out


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a scan.", metavar="DIR_A")],
    second: Annotated[Path, typer.Argument(help="Folder of another scan.", metavar="DIR_B")],
) -> None:
    """Compare two scans of models of one shape: do they rank the heads alike?"""
    from interp.atlas import Atlas

    a, b = Atlas.load(first), Atlas.load(second)
    compared = a.compare(b)
    console = out()
    console.print(common.about_line(a), soft_wrap=True)
    console.print(common.about_line(b), soft_wrap=True)
    table = common.table(
        "score",
        "rank corr.",
        "heads",
        "top-10 overlap",
        "",
        right=("rank corr.", "heads", "top-10 overlap"),
    )
    table.columns[0].no_wrap = True
    for row in compared.itertuples(index=False):
        rank = "–" if row.spearman is None else f"{row.spearman:.3f}"
        overlap = "–" if row.top10_overlap is None else f"{row.top10_overlap:.0%}"
        table.add_row(
            Text(row.score, style="bold"),
            rank,
            str(row.heads),
            overlap,
            Text(row.remark, style="dim"),
        )
    console.print(table)
    note(
        "Rank corr.: Spearman's over heads, 1 is the same order. Overlap: strongest heads that "
        "both name."
    )
    if "inputs" in compared.attrs:
        console.print(Text(compared.attrs["inputs"], style="yellow"), soft_wrap=True)
    only = sorted(set(a.scores) ^ set(b.scores))
    if only:
        note(f"In one of them only: {', '.join(only)}.")
