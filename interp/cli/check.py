"""`interp check`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import DeviceOption, DtypeOption, err, out

if TYPE_CHECKING:
    from interp_hooks.conformance.checks import Outcome

STATUSES = ("equal", "wrong", "refused", "unavailable")


def check(
    model: Annotated[
        str, typer.Argument(help="Bundled name, alias, Hugging Face id, folder or GGUF file.")
    ],
    target: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A JSON file of every comparison.", metavar="FILE"),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask before a download.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a record a comparison as JSON.")
    ] = False,
) -> None:
    """Compare what is measured in a model, and what edits do to it, with its own eager attention.

    Logits, every statistic, z, head weights and three edits; plain, padded, with a cache, in
    `generate` and with a static cache. Ends with 1 where something differs.
    """
    from interp.support.files import check_writable, write_atomic
    from interp_hooks.conformance.checks import check as compare

    if target is not None:
        check_writable(target.parent)
    loaded = common.load(model, device, dtype, yes=yes)
    with err().status(f"Comparing {model} with its eager attention …"):
        outcomes = compare(loaded)
    if target is not None:
        rows = [asdict(outcome) for outcome in outcomes]
        write_atomic(target, json.dumps(rows, indent=1).encode())
    wrong = sum(outcome.status == "wrong" for outcome in outcomes)
    if as_json:
        emit(outcomes)
        if wrong:
            raise typer.Exit(1)
        return
    console = out()
    console.print(counted(outcomes))
    for outcome in outcomes:
        if outcome.status != "equal":
            line = f"{outcome.status}: {outcome.mode}, {outcome.check}: {outcome.detail}"
            style = "red" if outcome.status == "wrong" else "dim"
            console.print(Text(line, style=style), soft_wrap=True)
    if wrong:
        console.print(f"{wrong} of {len(outcomes)} comparisons differ.")
        raise typer.Exit(1)
    console.print(f"None of {len(outcomes)} comparisons differs.")


def counted(outcomes: list[Outcome]) -> Table:
    """How many comparisons of each mode came out how."""
    present = [s for s in STATUSES if any(o.status == s for o in outcomes)]
    grid = common.table("", *present, right=tuple(present))
    for mode in dict.fromkeys(o.mode for o in outcomes):
        counts = Counter[str](o.status for o in outcomes if o.mode == mode)
        grid.add_row(Text(mode, style="bold"), *(str(counts[s] or "") for s in present))
    return grid
