"""`interp list`: everything that is found by name, other packages' entries too."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from interp.calibration import catalogue as calibration
from interp.circuits.methods import catalogue as circuits
from interp.cli.as_json import emit
from interp.cli.common import listing, out, table
from interp.edits import catalogue as edits
from interp.probes import catalogue as probes
from interp.procedures import catalogue as procedures
from interp.scores import catalogue as scores
from interp.tasks import catalogue as tasks

KINDS = {
    "scores": scores,
    "probes": probes,
    "tasks": tasks,
    "edits": edits,
    "procedures": procedures,
    "circuits": circuits,
    "calibration": calibration,
}
EVERYTHING = " ".join(f"{kind}: {listing(catalogue)}." for kind, catalogue in KINDS.items())


def show_names(
    kind: Annotated[
        str | None, typer.Argument(help=f"One kind, or all. {EVERYTHING}", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print records (kind, name, summary) as JSON.")
    ] = False,
) -> None:
    """List what is found by name, with what each is: scores, probes, tasks, edits, procedures, and
    the methods of circuits and calibration."""
    from interp.errors import UnknownNameError

    if kind is not None and kind not in KINDS:
        raise UnknownNameError(f"There is no kind {kind!r}; there are {', '.join(KINDS)}.")
    names = [kind] if kind else list(KINDS)
    if as_json:
        emit(
            [
                {"kind": name, "name": entry, "summary": what}
                for name in names
                for entry, what in KINDS[name].registry.summaries().items()
            ]
        )
        return
    for name in names:
        grid = table(name, "")
        grid.columns[0].no_wrap = True
        for entry, what in KINDS[name].registry.summaries().items():
            grid.add_row(Text(entry, style="bold"), Text(what))
        out().print(grid)
