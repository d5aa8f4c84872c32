"""`interp calibrate`."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from interp.calibration import catalogue as methods
from interp.calibration.catalogue import make
from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import (
    BackendOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    FormatOption,
    ModelOption,
    OverwriteOption,
    QuantizationOption,
    RevisionOption,
    SeedOption,
    explained,
    listing,
    note,
    out,
)
from interp.support.progress import progress
from interp.tasks import catalogue as tasks

if TYPE_CHECKING:
    from interp.calibration.calibration import Calibration


class Guard(str, Enum):
    """What guards against heads that look good by chance."""

    bh = "bh"
    none = "none"


def calibrate(
    out_file: Annotated[
        Path,
        typer.Option(
            "--out", help="The JSON file for the edits, as --edit takes it.", metavar="FILE.json"
        ),
    ],
    method: Annotated[
        str,
        typer.Option(help=f"What to find. {explained(methods)}"),
    ],
    model: ModelOption = "llama",
    task: Annotated[
        str | None,
        typer.Option(
            help=f"Task to calibrate on ({listing(tasks)}, or a file of one's own); the method's "
            "usual one if not given."
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", min=8, help="Training instances; as many others are held out.")
    ] = 64,
    format: FormatOption = None,
    force: ForceOption = False,
    overwrite: OverwriteOption = False,
    unsupervised: Annotated[
        bool,
        typer.Option(
            "--unsupervised",
            help="zerotuning: lowest next-token entropy; labels are not looked at.",
        ),
    ] = False,
    layers: Annotated[
        str | None, typer.Option(help="act, zerotuning, headhunter: only these layers, like 0,3-5.")
    ] = None,
    guard: Annotated[
        Guard | None, typer.Option(help="act: bh (Benjamini-Hochberg) or none (the paper's).")
    ] = None,
    level: Annotated[
        float | None, typer.Option(help="act: false-discovery rate of the guard.")
    ] = None,
    using: Annotated[
        str | None, typer.Option(help="headhunter: ablate, scale or soft_pag.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="headhunter: rounds.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="headhunter: heads a round.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="gates: training steps.")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="gates: share of KV heads that stream.")
    ] = None,
    sink: Annotated[
        int | None, typer.Option(min=0, help="gates: first tokens that streaming keeps.")
    ] = None,
    recent: Annotated[
        int | None, typer.Option(min=1, help="gates: last tokens that streaming keeps.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    device_map: DeviceMapOption = None,
    quantization: QuantizationOption = None,
    revision: RevisionOption = None,
    backend: BackendOption = "auto",
    preset: Annotated[
        str | None, typer.Option(help="Settings of the method by name, like act's paper.")
    ] = None,
    seed: SeedOption = 0,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print an object as JSON: the edits, and what they do on both splits."
        ),
    ] = False,
) -> None:
    """Find good settings of an edit on a task, and measure them on held-out instances."""
    from interp import calibration
    from interp.calibration.run import check_out
    from interp.results.evaluation import edits_as_json

    options: dict[str, Any] = dict(
        unsupervised=unsupervised or None,
        layers=None if layers is None else parse_layers(layers),
        guard=None if guard is None else guard.value,
        level=level,
        using=using,
        rounds=rounds,
        top=top,
        steps=steps,
        sparsity=sparsity,
        sink=sink,
        recent=recent,
    )
    settings = {k: v for k, v in options.items() if v is not None}
    check_options(method, list(options), list(settings))
    searcher = make(method, settings, preset)
    if task is not None:
        tasks.get(task)  # what is wrong without the model is found before it is loaded
    check_out(out_file)
    loaded = common.load(
        model,
        device,
        dtype,
        backend,
        device_map=device_map,
        quantization=quantization,
        revision=revision,
    )
    with progress(f"Calibrating {method}") as report:
        result = calibration.calibrate(
            loaded,
            searcher,
            task,
            n,
            seed,
            out=out_file,
            progress=report,
            format=format,
            force=force,
            overwrite=overwrite,
        )
    if as_json:
        emit(
            {
                "model": loaded.name,
                "out": str(out_file),
                **{k: v for k, v in vars(result).items() if k not in ("trials", "trace", "edits")},
                "edits": edits_as_json(result.edits),
            }
        )
        return
    show(loaded.name, result, margins=not unsupervised)
    for remark in result.notes:
        note(remark)
    if not result.edits:
        return
    words = [
        "--model",
        model,
        "--task",
        task or result.task,
        "--edit",
        str(out_file),
        "--n",
        str(n),
    ]
    again = shlex.join(["interp", "evaluate", *words, "--seed", str(seed + 1)])
    note(f"Edits in {out_file}. Measure them on new instances (another seed): {again}")


def check_options(method: str, options: list[str], given: list[str]) -> None:
    """Raise `InputError` for an option that the method does not take, naming those that it does."""
    from interp import calibration
    from interp.errors import InputError

    names = [name for name in options if name in calibration.registry.get(method).settings()]
    for name in given:
        if name not in names:
            flags = ", ".join(f"--{option}" for option in names) or "none of its own"
            raise InputError(f"--{name} is not an option of the method {method}; it takes {flags}.")


def show(name: str, result: Calibration, margins: bool = True) -> None:
    """What the edits do on both splits; `margins` break ties between accuracies."""
    console = out()
    size = result.train.accuracy.baseline.n, result.heldout.accuracy.baseline.n
    line = (
        f", {result.method} on {result.task}, {size[0]} training and {size[1]} held-out instances"
    )
    console.print(Text.assemble((name, "bold"), line), soft_wrap=True)
    columns = ("untouched", "edited", "change [95 %]")
    table = common.table("", *columns, right=columns)
    for split, comparison in (("training", result.train), ("held out", result.heldout)):
        for what in ("accuracy", *(("margin",) if margins else ()), "entropy"):
            change = getattr(comparison, what)
            means = (f"{change.baseline.mean:.3f}", f"{change.edited.mean:.3f}")
            table.add_row(f"{split}, {what}", *means, common.interval(change.difference))
    for what, change in result.elsewhere.items():
        means = (f"{change.baseline.mean:.3f}", f"{change.edited.mean:.3f}")
        table.add_row(f"elsewhere, {what}", *means, common.interval(change.difference))
    console.print(table)


def parse_layers(written: str) -> list[int]:
    """Read "0,3-5" as [0, 3, 4, 5]. Raises `InputError`."""
    from interp.errors import InputError

    layers: list[int] = []
    for part in written.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"--layers takes numbers and ranges, like 0,3-5, and not {written!r}.")
        layers += range(int(first), int(last or first) + 1)
    if not layers:
        raise InputError(
            f"--layers names no layer in {written!r}; write numbers and ranges, like 0,3-5."
        )
    return layers
