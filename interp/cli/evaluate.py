"""`interp evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from interp.cli import common
from interp.cli.common import BackendOption, DeviceOption, DtypeOption, EditOption, ModelOption, SeedOption, out


def evaluate(
    model: ModelOption = "llama",
    task: Annotated[str, typer.Option(help="Task to evaluate: niah, ioi, induction, …")] = "niah",
    edit: EditOption = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many instances of the task.")] = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Measure a model on a task, with and without edits."""
    from interp import tasks

    tasks.get(task)  # an unknown name is found before the model is loaded
    edits = common.load_edits(edit) if edit is not None else []
    import interp

    loaded = common.load(model, device, dtype, backend)
    with common.progress(f"Evaluating {task}") as report:
        result = interp.evaluate(loaded, task=task, edits=edits, n=n, seed=seed, progress=report)
    console = out()
    head = Text.assemble((loaded.name, "bold"), f", {result.task}, {result.baseline.n} instances")
    console.print(head, soft_wrap=True)
    value = f"{result.metric} [95 %]"
    made = common.table("", value, right=(value,))
    made.add_row("untouched", common.interval(result.baseline))
    if result.edited is not None:
        made.add_row("edited", common.interval(result.edited))
        made.add_row("change", common.interval(result.difference))
    console.print(made)
