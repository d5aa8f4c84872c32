"""`interp plan`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import note, out
from interp.scores import catalogue as scores_of
from interp.support.progress import duration


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Name, Hugging Face id, folder or config.json: its configuration is enough."
        ),
    ],
    context: Annotated[int, typer.Option(min=32, help="Length of the inputs in tokens.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="How many inputs a score.")] = 16,
    scores: Annotated[
        str, typer.Option(help=f"As scan-heads takes them. There are {common.listing(scores_of)}.")
    ] = "default",
    gpus: Annotated[
        int, typer.Option(min=0, help="How many H200s; 0 for the CPU of the benchmarks.")
    ] = 0,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Read texts so many tokens at a time over a cache.",
            show_default="all at once",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16.",
            show_default="float32 on a CPU, the checkpoint's on GPUs",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object as JSON.")] = False,
) -> None:
    """Tell what a scan of a model would take, before any weight is there: passes, seconds and
    gigabytes, with how well that is known."""
    import interp

    cost = interp.scan_cost(model, context, samples, scores, gpus=gpus, chunk=chunk, dtype=dtype)
    if as_json:
        emit(cost.to_json())
        return
    size = "tokens × rows"
    table = common.table("passes", size, right=(size,), title=f"A scan of {cost.model}")
    for one in cost.passes:
        steps = f", then {one.steps} steps" if one.steps else ""
        table.add_row(Text(one.what, style="bold"), Text(f"{one.tokens:,} × {one.rows}{steps}"))
    console = out()
    console.print(table)
    where = cost.machine if not gpus else f"{gpus} × {cost.machine}"
    low, high = map(duration, cost.seconds)
    console.print(Text.assemble(("Time    ", "dim"), f"{low} to {high} on {where}"), soft_wrap=True)
    parts = (
        f"{gigabytes(cost.bytes)}: weights {gigabytes(cost.bytes_weights)}, cache "
        f"{gigabytes(cost.bytes_cache)}, at work {gigabytes(cost.bytes_working)}"
    )
    console.print(Text.assemble(("Memory  ", "dim"), parts), soft_wrap=True)
    if gpus:
        many = f"{cost.copies} of the model at work, {cost.gpus_a_copy} GPU(s) each"
        console.print(Text.assemble(("Copies  ", "dim"), many), soft_wrap=True)
    note(f"Seconds are {cost.rests_on}.")
    for remark in cost.notes:
        console.print(Text(remark, style="yellow"), soft_wrap=True)


def gigabytes(count: float) -> str:
    """Bytes as "16.1 GB", or "4 MB" where that is more telling."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{max(1, round(count / 1e6))} MB"
