"""`interp compress`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    FormatOption,
    ModelOption,
    RevisionOption,
    SeedOption,
    note,
    out,
    table,
)
from interp.support.progress import progress


def compress(
    model: ModelOption = "llama",
    budget: Annotated[
        float, typer.Option(help="Share of the cache's memory that may be held.")
    ] = 0.5,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for the gates, as DuoAttention's table and as an edit."
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=32, help="Tokens of the texts; 1024 or the model's limit.")
    ] = None,
    score: Annotated[
        str, typer.Option(help="The score that says which heads need the whole text.")
    ] = "retrieval",
    sink: Annotated[int, typer.Option(min=0, help="First tokens that a streaming head holds.")] = 4,
    recent: Annotated[int, typer.Option(min=1, help="Recent tokens that it holds.")] = 64,
    n: Annotated[int, typer.Option("--n", min=2, help="Needle problems of the check.")] = 24,
    samples: Annotated[int, typer.Option(min=1, help="Samples of the scan.")] = 16,
    format: FormatOption = None,
    force: ForceOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Choose the kv heads that keep the whole text, let the others stream, and check what that
    costs beside other ways to hold as much."""
    from interp.support.files import check_writable

    if target is not None:
        check_writable(target)
    loaded = common.load(model, device, dtype, revision=revision)
    from interp.caches.compress import compress as run

    with progress("Compressing") as report:
        found = run(
            loaded,
            budget,
            context=context,
            score=score,
            sink=sink,
            recent=recent,
            n=n,
            samples=samples,
            seed=seed,
            format=format,
            force=force,
            progress=report,
        )
    if target is not None:
        found.save(target)
    if as_json:
        emit(json.loads(found.frame.to_json(orient="records")))
        return
    note(f"{found.phrase}.")
    grid = table("cache", "memory", "needles", "change [95 %]", "loss", "change [95 %]")
    for row in found.rows():
        grid.add_row(*row)
    out().print(grid)
    for one in found.notes:
        note(one)
    if target is not None:
        note(f"Written to {target}: interp generate --edit {target}/gate.json shows what it does.")
