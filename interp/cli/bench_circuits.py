"""`interp bench-circuits`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from interp.circuits.methods import catalogue as methods
from interp.cli import common
from interp.cli.as_json import emit, records
from interp.cli.common import (
    BackendOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    OverwriteOption,
    QuantizationOption,
    RevisionOption,
    SeedOption,
    listing,
    note,
    out,
)
from interp.support.progress import progress
from interp.tasks import catalogue as tasks

if TYPE_CHECKING:
    from interp.circuits.benching.bench import Bench

FOLDER = Path("interp-circuits")


def bench_circuits(
    model: ModelOption = "llama",
    task: Annotated[
        str, typer.Option(help=f"Task: {listing(tasks)}, or a file of one's own.")
    ] = "ioi",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method, or FILE.py:function; may be repeated. "
            f"There are {', '.join(methods.names())}.",
            show_default="attribution, eap",
        ),
    ] = None,
    truth: Annotated[
        list[str] | None,
        typer.Option(
            help="Which heads matter: measured by ablating every head by mean, resample, optimal "
            "or zero, or a file of `Truth.save`; may be repeated.",
            show_default="mean, resample",
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for the result.", show_default="interp-circuits/MODEL-TASK-bench"
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=4, help="Pairs of prompts of the methods.")] = 64,
    truth_prompts: Annotated[
        int, typer.Option(min=4, help="Other pairs, on which truths are measured.")
    ] = 256,
    draws: Annotated[int, typer.Option(min=1, help="Shuffles of each kind.")] = 3,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    device_map: DeviceMapOption = None,
    quantization: QuantizationOption = None,
    revision: RevisionOption = None,
    backend: BackendOption = "auto",
    seed: SeedOption = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print an object as JSON: the rows, and the folder.")
    ] = False,
) -> None:
    """Hold circuit methods, yours too, against heads that matter, each beside the same method on
    shuffled prompts and beside rankings that know nothing of the task."""
    from interp.circuits.benching.bench import HEAD
    from interp.errors import OutputError
    from interp.support.files import check_writable, folder_name

    check_writable(target or FOLDER)
    asked = {name: methods.as_method(name, None, {}) for name in method or ("attribution", "eap")}
    tasks.get(task)
    truths = [read(name) for name in truth or ("mean", "resample")]
    from interp import circuits

    loaded = common.load(
        model,
        device,
        dtype,
        backend,
        device_map=device_map,
        quantization=quantization,
        revision=revision,
    )
    folder = target or FOLDER / folder_name(loaded.name, task, "bench")
    if (folder / HEAD).exists() and not overwrite:
        raise OutputError(f"{folder} holds a bench already; give --overwrite or another --out.")
    with progress("Testing circuit methods") as report:
        found = circuits.bench(
            loaded, task, asked, truths, n, seed, draws=draws, truth_prompts=truth_prompts,
            progress=report, resume=folder,
        )  # fmt: skip
    found.save(folder)
    if as_json:
        emit({"folder": str(folder), "truths": found.truths, "rows": records(found.frame)})
        return
    show(found)
    out().print(f"{folder}", markup=False, soft_wrap=True)


def read(name: str) -> Any:
    """The word for a measured truth, or the truth of a file. Raises `InputError`, `OutputError`."""
    from interp.circuits.known.truth import Truth
    from interp.circuits.runs.paired_runs import ABLATIONS
    from interp.errors import InputError

    if name in ABLATIONS:
        return name
    if not Path(name).is_file():
        raise InputError(
            f"A truth is measured by {', '.join(ABLATIONS)}, or a JSON file (Truth.save writes "
            f"it), and {name!r} is neither."
        )
    return Truth.load(name)


def show(found: Bench) -> None:
    """A table a truth, a line a control, and who does not beat the shuffle."""
    console = out()
    console.print(Text.assemble((found.model, "bold"), f", {found.task}"))
    for truth, about in found.truths.items():
        for ranked in ("heads", "edges"):
            rows = found.of(truth, ranked)
            if not rows:
                continue
            console.print(f"\nAgainst {truth}, {ranked}: {about}", markup=False, soft_wrap=True)
            columns = ("method", "AUC [95 %]", "AP", "shuffled", "gain [95 %]")
            grid = common.table(*columns, right=columns[1:3])
            grid.columns[0].no_wrap = True
            for method, some in rows:
                first = some[0]
                own = [method, f"{first.auc:.2f} [{first.auc_low:.2f}, {first.auc_high:.2f}]"]
                own.append(f"{first.average_precision:.2f}")
                for row in some:
                    gain = f"{row.gain:+.2f} [{row.gain_low:+.2f}, {row.gain_high:+.2f}]"
                    mark = "" if row.beats else " †"
                    control = [f"{row.control}{mark}", gain] if row.control else ["–", ""]
                    grid.add_row(*own, *control)
                    own = ["", "", ""]
            console.print(grid)
    lost = sorted({f"{m} ({c})" for m, _, c in found.beaten()})
    if lost:
        note(
            f"† does not beat its shuffled twin: {', '.join(lost)}. Such a ranking would have come "
            "out as well with wrong answers or wrong twins."
        )
