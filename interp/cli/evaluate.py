"""`interp evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import (
    AddressOption,
    BackendOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    EditOption,
    ForceOption,
    FormatOption,
    ModelOption,
    OverwriteOption,
    QuantizationOption,
    RevisionOption,
    SeedOption,
    WorkersOption,
    listing,
    note,
    out,
)
from interp.support.progress import progress
from interp.tasks import catalogue as tasks


def evaluate(
    model: ModelOption = "llama",
    task: Annotated[
        str | None,
        typer.Option(
            help=f"Task to evaluate: {listing(tasks)}, a file of one's own, or lm_eval:NAME.",
            show_default="niah; none for the loss",
        ),
    ] = None,
    edit: EditOption = None,
    n: Annotated[
        int,
        typer.Option(
            "--n", "--limit", min=1, help="How many instances of the task, or rows of text."
        ),
    ] = 32,
    metric: Annotated[
        str | None,
        typer.Option(
            help="loss: of the second half of texts given the first; or one of the harness's task."
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=32, help="Tokens of every needle prompt, or of a row of text.")
    ] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Allow a context past the model's limit.")
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(
            help="A text, or a text file (UTF-8), for the loss, instead of the English shipped.",
            metavar="TEXT|FILE",
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="A folder of lm-evaluation-harness tasks (YAML).", metavar="DIR"),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot", min=0, help="Solved documents before each of the harness's task."
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template", help="The harness's prompts in the tokenizer's chat template."
        ),
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(
            "--fewshot-as-multiturn/--fewshot-in-one-turn", help="Each shot as turns of the chat."
        ),
    ] = None,
    controls: Annotated[
        int,
        typer.Option(
            min=0, help="How often the same edits of random heads of the same layers run beside."
        ),
    ] = 0,
    format: FormatOption = None,
    force: ForceOption = False,
    overwrite: OverwriteOption = False,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder to save the result in, a row an instance.", metavar="DIR"
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    device_map: DeviceMapOption = None,
    quantization: QuantizationOption = None,
    revision: RevisionOption = None,
    backend: BackendOption = "auto",
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    address: AddressOption = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print an object as JSON: the means and intervals, and where they come from.",
        ),
    ] = False,
) -> None:
    """Measure a model on a task, or its loss on text, with and without edits."""
    # What can go wrong without the model goes wrong before it is loaded.
    if task is None or not task.startswith("lm_eval:"):
        from interp import tasks

        tasks.get(task or "niah")
    else:
        from interp.evaluation import lm_eval as harness

        harness.check_installed()
    given: str | Path | None = None
    if text is not None:
        from interp.inputs.text import content, file_of

        content(text)
        given = file_of(text) or text
    if target is not None:
        from interp.support.files import check_writable

        check_writable(target)
    edits = common.load_edits(edit) if edit is not None else []
    shared = common.workers(workers, address)
    import interp
    from interp.results.evaluation import HEAD
    from interp.support.finished import check_early, check_replaceable
    from interp.support.ownership import owned

    loaded = common.load(
        model,
        device,
        dtype,
        backend,
        device_map=device_map,
        quantization=quantization,
        revision=revision,
    )
    more: dict[str, Any] = dict(
        metric=metric,
        context=context,
        extrapolate=extrapolate,
        text=given,
        include_path=include_path,
        format=format,
        force=force,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=fewshot_as_multiturn,
        controls=controls,
    )
    if target is not None:
        check_early(target / HEAD, overwrite, loaded.name, seed)
    with shared as cluster, owned(target):
        what = task or metric or "niah"
        with_edits = ", without and with the edits" if edits else ""
        note(f"{n} {'problems of ' + what if metric is None else 'rows for ' + what}{with_edits}.")
        with progress(f"Evaluating {what}") as bar:
            report = common.estimated(bar)
            run = interp.evaluate if cluster is None else cluster.evaluate
            result = run(loaded, task=task, edits=edits, n=n, seed=seed, progress=report, **more)
        if as_json:
            emit({"model": loaded.name, **result.summary()})
        else:
            show(loaded.name, result)
        if target is not None:
            check_replaceable(target / HEAD, result.provenance, overwrite)
            result.save(target)
            note(f"Saved in {target}.")


def show(name: str, result: Any) -> None:
    """The table of an evaluation, the paired test, and what a reader must know."""
    console = out()
    head = Text.assemble((name, "bold"), f", {result.task}, {result.baseline.n} instances")
    console.print(head, soft_wrap=True)
    value = f"{result.metric} [95 %]"
    table = common.table("", value, right=(value,))
    table.add_row("untouched", common.interval(result.baseline))
    if result.edited is not None:
        table.add_row("edited", common.interval(result.edited))
        table.add_row("change", common.interval(result.difference))
    if result.control is not None:
        table.add_row("random heads", common.interval(result.control.difference))
        table.add_row("beyond them", common.interval(result.control.beyond))
    console.print(table)
    if result.more:
        others = common.table(
            "", "untouched", *(("edited", "change") if result.edited is not None else ())
        )
        for name, one in result.more.items():
            cells = [
                one.baseline,
                *((one.edited, one.difference) if result.edited is not None else ()),
            ]
            others.add_row(name, *(common.interval(cell) for cell in cells))
        console.print(others)
    if result.mcnemar is not None:
        console.print(Text(f"McNemar, exact: {result.mcnemar}"), soft_wrap=True)
    if result.control is not None:
        low, high = min(result.control.draws), max(result.control.draws)
        console.print(
            f"{len(result.control.draws)} draws of random heads: {low:+.3f} … {high:+.3f}."
        )
    for remark in result.notes:
        console.print(Text(remark, style="yellow"), soft_wrap=True)
