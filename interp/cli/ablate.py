"""`interp ablate`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from interp.cli import as_json as documents
from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import (
    AddressOption,
    BackendOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    FormatOption,
    ModelOption,
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

if TYPE_CHECKING:
    from interp.atlas import Atlas
    from interp_hooks.heads import Head


class Mode(str, Enum):
    """What takes the place of a head's output."""

    zero = "zero"
    mean = "mean"
    resample = "resample"
    uniform = "uniform"
    frozen = "frozen"
    random = "random"


#: what a mode puts in the place of a head's output
SAID = {
    "zero": "0",
    "mean": "its mean over the task's corrupted prompts",
    "resample": "that of a random place in the task's corrupted prompts",
    "uniform": "the mean of the values it can see",
    "frozen": "what it would give with another text's attention pattern",
    "random": "what it would give with its weights dealt out anew among the keys it sees",
}


def ablate(
    model: ModelOption = "llama",
    heads: Annotated[
        str | None, typer.Option(help="Heads, layer first: 3.1,4.2 or L3H1,L4H2.")
    ] = None,
    top: Annotated[
        str | None,
        typer.Option(help="The strongest heads of a score: retrieval:5. Scans it first."),
    ] = None,
    atlas: Annotated[
        Path | None, typer.Option(help="With --top: take them from this saved scan.", metavar="DIR")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="What replaces a head's output.")] = Mode.zero,
    task: Annotated[
        str, typer.Option(help=f"Task to evaluate: {listing(tasks)}, or a file of one's own.")
    ] = "niah",
    format: FormatOption = None,
    force: ForceOption = False,
    n: Annotated[int, typer.Option("--n", min=1, help="How many instances of the task.")] = 32,
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
            help="Print an object as JSON: untouched, ablated and control, with intervals.",
        ),
    ] = False,
) -> None:
    """Take heads out and see what a task loses, against as many other heads taken out."""
    from interp.errors import InputError

    if (heads is None) == (top is None):
        raise InputError("Say which heads to ablate: either --heads 3.1,4.2 or --top retrieval:5.")
    if atlas is not None and top is None:
        raise InputError(
            "--atlas says where --top takes its heads from; add --top retrieval:5, or leave it out."
        )
    targets = named(heads) if heads is not None else []
    rivals: list[Head] = []
    score, count = parse_top(top) if top is not None else ("", 0)
    if atlas is not None:
        targets, rivals = from_atlas(atlas, score, count)
    common.check_heads(targets, model)
    shared = common.workers(workers, address)
    tasks.get(task)  # what is wrong without the model is found before it is loaded
    import interp

    loaded = common.load(
        model,
        device,
        dtype,
        backend,
        device_map=device_map,
        quantization=quantization,
        revision=revision,
    )
    if top is not None and atlas is None:
        targets, rivals = scanned(loaded, score, count, seed)
    check(targets, loaded)
    note(
        f"Ablating {', '.join(map(str, targets))} of {loaded.name}: {mode.value}, the output of "
        f"each becomes {SAID[mode.value]}. {n} problems of {task}, untouched, ablated and with "
        "other heads ablated."
    )
    with shared as cluster, progress(f"Ablating on {task}") as bar:
        report = common.estimated(bar)
        run = interp.ablate if cluster is None else cluster.ablate
        result = run(
            loaded,
            targets,
            mode=mode.value,
            task=task,
            n=n,
            seed=seed,
            avoid=rivals,
            progress=report,
            format=format,
            force=force,
        )
    if as_json:
        emit(documents.ablation(loaded.name, mode.value, result))
        return
    console = out()
    console.print(
        Text.assemble(
            (loaded.name, "bold"), f", {task}, {result.baseline.n} instances, {mode.value} ablation"
        )
    )
    measured = ("accuracy [95 %]", "change [95 %]")
    table = common.table("", *measured, "heads", right=measured)
    table.add_row("untouched", common.interval(result.baseline), "", "")
    table.add_row(
        "ablated",
        common.interval(result.ablated),
        common.interval(result.difference),
        _join(result.heads),
    )
    if result.control is not None:
        table.add_row(
            "control",
            common.interval(result.control),
            common.interval(result.control_difference),
            Text(f"{len(result.draws)} random draws"),
        )
    console.print(table)
    if result.control is not None:
        note(f"control: {result.control_said}.")
    for remark in result.notes:
        console.print(Text(remark, style="yellow"), soft_wrap=True)


def named(written: str) -> list[Head]:
    """`--heads` as heads. Raises `HeadError`, or `InputError` when it names none."""
    from interp.errors import InputError
    from interp_hooks.heads import parse_heads

    heads = list(dict.fromkeys(parse_heads(written)))
    if not heads:
        raise InputError("--heads names no head; write them layer first, like 3.1,4.2.")
    return heads


def from_atlas(folder: Path, score: str, count: int) -> tuple[list[Head], list[Head]]:
    """The top heads of a saved scan, and all that reach the score's threshold. Raises `InputError`
    without any."""
    from interp.atlas import Atlas

    return _measured(Atlas.load(folder), score, count)


def scanned(model: Any, score: str, count: int, seed: int) -> tuple[list[Head], list[Head]]:
    """The same from a scan made now; nothing is saved."""
    import interp

    plan = interp.plan_scan(model, scores=score, seed=seed)
    with progress(f"Scanning {score}") as report:
        atlas = plan.run(None, report)
    for remark in atlas.notes:
        note(remark)
    return _measured(atlas, score, count)


def check(heads: list[Head], model: Any) -> None:
    """Raise `HeadError` for a head that the model lacks, before anything expensive runs."""
    for head in heads:
        model.check(head)


def parse_top(written: str) -> tuple[str, int]:
    """Read "retrieval:5" as ("retrieval", 5). Raises `InputError`."""
    from interp.errors import InputError

    score, colon, count = written.rpartition(":")
    if not colon or not score or not count.isdecimal() or int(count) < 1:
        raise InputError(
            f"--top takes a score and a number of heads, like retrieval:5, and not {written!r}."
        )
    return score, int(count)


def _measured(atlas: Atlas, score: str, count: int) -> tuple[list[Head], list[Head]]:
    """(top heads, heads of the same kind, which must not serve as controls)."""
    from interp.errors import InputError

    threshold = atlas.about(score).threshold
    heads = [head for head, _, _ in atlas.head_ranking(score, count)]
    if not heads:
        raise InputError(
            f"No head has a {score} score here, so there is none to ablate; name them with --heads."
        )
    return heads, [
        head
        for head, value, _ in atlas.head_ranking(score)
        if threshold is not None and value >= threshold
    ]


def _join(heads: list[Head]) -> Text:
    return Text(" ".join(map(str, heads)))
