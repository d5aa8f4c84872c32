"""One calibration from beginning to end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from interp import tasks
from interp.calibration.calibration import Calibration, Comparison, beside
from interp.calibration.calibration_method import Method
from interp.calibration.catalogue import make
from interp.calibration.elsewhere import elsewhere
from interp.calibration.splits import Bench, Split, split
from interp.errors import OutputError
from interp.inputs.text import check_seed
from interp.support.checkpoints import Checkpoints
from interp.support.files import check_writable, sweep
from interp.support.finished import check_replaceable, is_unfinished
from interp.support.ownership import owned
from interp.support.progress import Shown, reporting
from interp.support.provenance import provenance
from interp.tasks.floor import check_floor
from interp.tasks.task import Task


@reporting("Calibrating")
def calibrate(
    model: Any,
    method: str | Method = "act",
    task: str | Task | None = None,
    n: int = 64,
    seed: int = 0,
    heldout: int | None = None,
    out: str | Path | None = None,
    progress: Shown = None,
    format: str | None = None,
    force: bool = False,
    overwrite: bool = False,
    preset: str | None = None,
    **settings: Any,
) -> Calibration:
    """Calibrates an edit: settings are chosen on training instances, measured on held-out ones.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        method: "act", "zerotuning", "headhunter", "gates" (their settings as `settings`), or a
            `Method`.
        task: a name, or a task with settings of its own; the method's usual task if None.
        n: training instances.
        seed: of both splits.
        heldout: how many held-out instances; as many as `n` if None. They share no instance with
            the training split.
        out: write the edits to this JSON file, trials and record beside it; an interrupted run
            resumes from there.
        progress: True for a bar with the time left, or a function (done, total, what).
        format: of the prompts; the one that the model understands best if not given.
        force: go on where the untouched model can't do the task.
        overwrite: replace another calibration, or edits, that `out` holds.
        preset: settings of the method under a name, such as act's "paper"; `settings` come on top.
        settings: the method's.

    Returns:
        A `Calibration`: the edits, and what they do on both splits.

    Raises:
        UnknownNameError: no such method or task.
        FloorError: the untouched model can't do the task.
        InputError: settings that the method does not take, too few instances, a calibration set
            with one class.
        ContextError, EditError, HeadError, OutputError.

    Example:
        >>> found = interp.calibrate(model, "zerotuning", n=8, grid=[0.5, 2.0])
        >>> found.method, found.heldout.accuracy.difference.n
        ('zerotuning', 8)
    """
    from interp.loading import load

    method, out = make(method, settings, preset), None if out is None else Path(out)
    check_seed(seed)
    task = method.usual_task if task is None else task
    if isinstance(task, str):
        tasks.get(task)  # an unknown name is found before the model is loaded
    check_out(out)
    hooked = load(model)
    with hooked.clean():  # what is active outside must not be measured, and is no part of it
        parts = split(hooked, task, n, heldout, seed, method.needs_labels, format)
        method.check(hooked, parts.train)
        used = dict(
            method=method.name,
            task=repr(parts.task),
            n=n,
            heldout=len(parts.heldout),
            backend=hooked.backend,
            **{f"{method.name}.{k}": v for k, v in method.record().items()},
        )
        inputs = [torch.tensor(i.ids) for i in (*parts.train, *parts.heldout)]
        record = provenance(
            hooked, seed, used, [*inputs, parts.train, parts.heldout], [method, parts.task]
        )
        if out is not None:
            check_unclaimed(out, record, overwrite)
        folder = None if out is None else beside(out, "resume")
        with owned(folder, passing=True):
            pieces = Checkpoints(folder, record)
            bench = Bench(hooked, parts, seed, pieces, progress)
            with pieces.resumable():
                found = _found(method, bench, parts, record, force)
            if out is not None:
                sweep(out.parent, out.stem)
                found.save(out)
            pieces.clear()
    return found


def _found(
    method: Method, bench: Bench, parts: Split, record: dict[str, Any], force: bool
) -> Calibration:
    """The search, and what its edits do on both splits."""
    model, seed = bench.model, bench.seed
    bench.plan(trials=2)
    bench.expect(2 * len(parts.heldout))
    started = time.time()
    before = bench("train-untouched", [], "untouched")
    floor = check_floor(model, parts.task, parts.train, before.correct.tolist(), force)
    result = method.find(bench)
    train = Comparison.of(before, bench("train-chosen", result.edits, "chosen"), seed)
    plain = bench("heldout-untouched", [], "held out, untouched", heldout=True)
    held = Comparison.of(
        plain, bench("heldout-chosen", result.edits, "held out, chosen", heldout=True), seed
    )
    bench.step("what it costs elsewhere")
    costs, unmeasured = elsewhere(model, parts.task, result.edits, seed)
    record["seconds"] = round(time.time() - started, 2)
    said = [n for n in (parts.note, floor) if n]
    return Calibration(
        method.name,
        parts.task.name,
        result.edits,
        result.trials,
        train,
        held,
        result.trace,
        [*said, *result.notes, *unmeasured, *bench.pieces.notes],
        record,
        costs,
    )


def check_unclaimed(out: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Raise `OutputError` where `out` holds other edits, or another calibration's, unless they may
    be replaced."""
    head = beside(out, "calibration.json")
    check_replaceable(head, record, overwrite)
    # a run that was killed while it saved left its edits without their record
    mine = is_unfinished(beside(out, "resume"), record)
    if out.exists() and not head.exists() and not overwrite and not mine:
        raise OutputError(
            f"{out} is there already and no calibration made it; choose another --out, or add "
            "--overwrite (overwrite=True) to replace it."
        )


def check_out(out: Path | None) -> None:
    """Raise `OutputError` before any work if the result could not be written."""
    if out is None:
        return
    if out.is_dir():
        raise OutputError(
            f"Can't write the edits to {out}: it is a folder; name a file, like "
            f"{out / 'edit.json'}."
        )
    check_writable(out.parent)
