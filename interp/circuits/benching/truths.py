"""What methods are held against, and prompts for the methods that it has not seen."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.circuits.finding import pose
from interp.circuits.known.truth import Truth
from interp.circuits.measured import APART, measured
from interp.circuits.runs.paired_runs import ABLATIONS
from interp.circuits.runs.prompts import Prompts, from_task
from interp.errors import InputError
from interp.support.fingerprint import fingerprint
from interp.support.provenance import identity

if TYPE_CHECKING:
    from interp.tasks.task import Task


def truth_of(
    model: Any,
    task: str | Task,
    truth: str | Truth,
    n: int,
    seed: int,
    resume: str | os.PathLike[str] | None = None,
) -> Truth:
    """A truth that is given, or is measured by the ablation named, on `n` pairs of prompts; in
    `resume` a measured one is kept until the bench is done. Raises `InputError`, and as
    `measured`."""
    if isinstance(truth, Truth):
        return truth
    if truth not in ABLATIONS:
        raise InputError(
            f"A truth is measured by {', '.join(ABLATIONS)}, or given as a Truth, not {truth!r}."
        )
    if resume is None:
        return measured(model, task, n, seed, truth)
    record = pose(model, task, "head_ablation", n, seed + APART, settings={"mode": truth}).record
    run = fingerprint(identity(record))[:16]
    kept = Path(resume) / "partial" / f"truth-{truth}-{run}.json"
    if not kept.is_file():
        measured(model, task, n, seed, truth, resume=kept.with_suffix("")).save(kept)
    return Truth.load(kept)


def apart(model: Any, task: str | Task, n: int, seed: int, truth_prompts: int) -> Prompts:
    """`n` pairs of prompts, as `find` draws them, without those that a truth of so many prompts was
    measured on (`measured` with the same seed). Raises `InputError` where there are not so
    many."""
    seen = {i.ids for i in from_task(model, task, truth_prompts, seed + APART).instances}
    for spare in (1, 2, 4, 8):
        drawn = from_task(model, task, spare * n, seed)
        fresh = {i.ids: i for i in drawn.instances if i.ids not in seen}
        if len(fresh) >= n:
            return replace(drawn, instances=tuple(fresh.values())[:n])
    raise InputError(
        f"The task {drawn.name} has only {len(fresh)} prompts beside those of the truths, and {n} "
        "were asked for; use fewer, or fewer for the truths."
    )
