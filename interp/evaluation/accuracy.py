"""Right and wrong answers to a task's problems, with and without edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp import tasks
from interp.edits.head_edit import HeadEdit
from interp.errors import InputError
from interp.evaluation.loss import past
from interp.inputs.context import check_context, extrapolation
from interp.results.evaluation import Evaluation, edits_as_json, summarise
from interp.support.checked import whole_number
from interp.support.provenance import provenance
from interp.tasks.answers import Judging, judge
from interp.tasks.floor import check_floor
from interp.tasks.posing import Posed, pose
from interp.tasks.task import Instance, Task
from interp_hooks.edit import Edit
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

Progress = Callable[[int, int, str], None]


def sample(
    model: HookedModel,
    task: str | Task,
    n: int,
    seed: int,
    context: int | None = None,
    extrapolate: bool = False,
    format: str | None = None,
) -> tuple[Posed, list[Instance]]:
    """The task in its format and `n` instances for this model.

    `format`: None for a named task's best ("auto") and a task object's own. Raises `InputError`,
    `ContextError`.
    """
    n = whole_number(n, "n, the number of instances,")
    if n < 1:
        raise InputError("An evaluation needs at least one instance; use n ≥ 1.")
    if not isinstance(task, str | Task):
        raise InputError(
            "A task is given by its name (interp.tasks.names() lists them), a file, or as a task "
            f"object, not {quoted(task)}."
        )
    chosen = tasks.get(task) if isinstance(task, str) else task
    limit = model.max_context
    if context is not None:
        if not hasattr(chosen, "exactly"):
            raise InputError(
                f"The task {chosen.name} has no length to choose; context is for niah and for "
                "losses."
            )
        chosen = chosen.exactly(context)
    elif isinstance(task, str) and hasattr(chosen, "at") and limit is not None:
        chosen = chosen.at(min(1024, limit))
    if format is None:
        format = "auto" if isinstance(task, str) else chosen.format
    posed = pose(model, chosen, format)
    instances = posed.task.sample(model.tokenizer, n, seed)
    check_context(model, max(len(i.ids) for i in instances), extrapolate)
    return posed, instances


def accuracy(
    hooked: HookedModel,
    task: str | Task,
    edits: Sequence[Edit],
    n: int,
    seed: int,
    progress: Progress | None,
    context: int | None,
    extrapolate: bool,
    format: str | None = None,
    force: bool = False,
    judging: Judging = judge,
) -> Evaluation:
    """Right and wrong answers of one of our own tasks, judged by `judging`. Raises `FloorError`
    where the untouched model can't do it."""
    import pandas as pd

    total = n * (2 if edits else 1)
    report = progress or (lambda done, total, what: None)
    report(0, total, "how to ask")
    posed, instances = sample(hooked, task, n, seed, context, extrapolate, format)
    chosen = posed.task
    stepwise = by_steps(edits) or hooked.gives_caches
    plain = judging(
        hooked, chosen, instances, (), stepwise, lambda k: report(k, total, "untouched")
    )
    floor = check_floor(hooked, chosen, instances, [correct for correct, _ in plain], force)
    frame = pd.DataFrame(plain, columns=["baseline", "baseline_margin"])
    if edits:
        changed = judging(
            hooked, chosen, instances, edits, stepwise, lambda k: report(n + k, total, "edited")
        )
        frame["edited"], frame["edited_margin"] = zip(*changed, strict=True)
    longest = max(len(i.ids) for i in instances)
    beyond = extrapolation(hooked, longest)
    settings = dict(
        task=chosen.name,
        task_settings=_settings(chosen),
        formats=dict(posed.solved),
        at_floor=floor is not None,
        metric="accuracy",
        n=n,
        steps=stepwise,
        context=longest,
        extrapolate=beyond,
        edits=edits_as_json(edits),
        backend=hooked.backend,
    )
    record = provenance(
        hooked,
        seed,
        settings,
        [*(torch.tensor(i.ids) for i in instances), instances],
        [chosen, *edits],
    )
    metric = {"exact": "exact answers", "recall": "recalled"}.get(chosen.judge, "accuracy")
    cached = "answers are fed token by token over the caches of an open block (model.caching)."
    said = (posed.note, floor, past(beyond) if beyond else None)
    notes = [n for n in (*said, cached if hooked.gives_caches else None) if n]
    return summarise(chosen.name, metric, frame, seed, record, notes)


def by_steps(edits: Sequence[Edit]) -> bool:
    """Whether answers are fed token by token: an edit has a scope, or picks its rows by what a
    forward holds."""
    own_rows = (Edit.rows, HeadEdit.rows)
    return any(e.scope != "all" or type(e).rows not in own_rows for e in edits)


def _settings(task: Task) -> dict[str, Any]:
    """The fields of a task that is a dataclass, as JSON holds them."""
    if not is_dataclass(task):
        return {}
    values = asdict(task)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
