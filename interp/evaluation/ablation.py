"""Take heads out and see what a task loses, against as many other heads taken out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from interp import tasks
from interp.edits.ablate import Ablate
from interp.errors import InputError
from interp.evaluation.accuracy import sample
from interp.inputs.text import check_seed
from interp.support.html import block, listed
from interp.support.progress import Shown, reporting
from interp.support.statistics import Interval, bootstrap
from interp.tasks.answers import Judging, judge
from interp.tasks.floor import check_floor
from interp.tasks.task import Task
from interp_hooks.heads import Head, parse_heads

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.model import HookedModel

#: random control sets; their results are averaged instance by instance
DRAWS = 5


@dataclass(frozen=True)
class Ablation:
    """Accuracy untouched, with `heads` ablated, and with controls ablated; differences are paired
    to the baseline.

    `draws`: the control's sets of random heads, whose results are averaged; `control_heads` is the
    first of them; `control` None where the model has too few other heads.
    """

    task: str
    heads: list[Head]
    control_heads: list[Head]
    baseline: Interval
    ablated: Interval
    difference: Interval
    control: Interval | None
    control_difference: Interval | None
    frame: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    draws: list[list[Head]] = field(default_factory=list)

    @property
    def control_said(self) -> str:
        """What the control is, in words; "" where there is none."""
        if not self.draws:
            return ""
        some = len(self.heads)
        return (
            f"{len(self.draws)} draws of {some} random head{'' if some == 1 else 's'} of the same "
            f"or the nearest layers, averaged; the first: {', '.join(map(str, self.draws[0]))}"
        )

    def _repr_html_(self) -> str:
        rows: list[list[Any]] = [
            ["untouched", self.baseline, "", ""],
            ["ablated", self.ablated, self.difference, self.heads],
        ]
        if self.control is not None:
            said = self.control_said or self.control_heads
            rows.append(["control", self.control, self.control_difference, said])
        return block(
            f"Ablation of {listed(self.heads)}",
            f"accuracy on {self.baseline.n} instances of {self.task}",
            headings=["", "accuracy", "change", "heads"],
            rows=rows,
            notes=["95 % intervals in brackets.", *self.notes],
        )


@reporting("Ablating")
def ablate(
    model: Any,
    heads: str | Iterable[Any],
    mode: str = "zero",
    task: str | Task = "niah",
    n: int = 32,
    seed: int = 0,
    avoid: Sequence[Head] = (),
    progress: Shown = None,
    *,
    format: str | None = None,
    force: bool = False,
    judging: Judging | None = None,
) -> Ablation:
    """Ablates heads on a task, beside a random control of as many heads.

    The control takes as many heads from the same layers, none of `heads` or `avoid`; where a layer
    has too few others, from the layers nearest to it.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        heads: the heads, in any spelling.
        mode: as in `edits.Ablate`; references are the task's corrupted prompts.
        task: a name, or a task with settings of its own.
        n: problems.
        seed: of the problems and of the control.
        avoid: heads that are no control either.
        progress: True for a bar with the time left, or a function (done, total, what).
        format: of the prompts; the one that the model understands best if not given.
        force: go on where the untouched model can't do the task.
        judging: who judges the answers; None for this process (`interp.cluster` has its own).

    Returns:
        An `Ablation`: untouched, ablated and control, with paired differences.

    Raises:
        HeadError: a head the model does not have.
        FloorError: the untouched model can't do the task.
        UnknownNameError, InputError, EditError.

    Example:
        >>> found = interp.ablate(model, "L2H3", task="induction", n=4)
        >>> found.heads, len(found.control_heads)
        ([L2H3], 1)
    """
    import pandas as pd

    from interp.loading import load

    check_seed(seed)
    if isinstance(task, str):
        tasks.get(task)
    hooked = load(model)
    targets = [hooked.check(h) for h in dict.fromkeys(parse_heads(heads))]
    if not targets:
        raise InputError("No head was named; write them layer first, like 3.1,4.2.")
    report = progress or (lambda done, total, what: None)
    report(0, n * (2 + DRAWS), "how to ask")
    posed, instances = sample(hooked, task, n, seed, format=format)
    problem = posed.task
    reference = problem.source if mode in ("mean", "resample") else None
    rng = np.random.default_rng(seed)
    draws = [controls(hooked, targets, avoid, rng) for _ in range(DRAWS)]
    draws = [d for d in draws if d]
    total = n * (2 + len(draws))

    def run(which: Sequence[Head], done: int, what: str) -> list[float]:
        edits = [Ablate(which, mode, reference, seed)] if which else []
        return [
            c
            for c, _ in (judging or judge)(
                hooked, problem, instances, edits, progress=lambda k: report(done + k, total, what)
            )
        ]

    untouched = run([], 0, "untouched")
    floor = check_floor(hooked, problem, instances, untouched, force)
    frame = pd.DataFrame(dict(baseline=untouched, ablated=run(targets, n, "ablated")))
    for i, draw in enumerate(draws):
        frame[f"control_{i}"] = run(draw, n * (2 + i), f"control {i + 1} of {len(draws)}")
    control = difference = None
    if draws:
        mean = frame.filter(like="control_").mean(axis=1)
        control = bootstrap(mean.tolist(), seed)
        difference = bootstrap((mean - frame.baseline).tolist(), seed)
    return Ablation(
        problem.name,
        targets,
        draws[0] if draws else [],
        bootstrap(frame.baseline.tolist(), seed),
        bootstrap(frame.ablated.tolist(), seed),
        bootstrap((frame.ablated - frame.baseline).tolist(), seed),
        control,
        difference,
        frame,
        [note for note in (posed.note, floor) if note],
        draws,
    )


def controls(
    model: HookedModel, heads: Sequence[Head], avoid: Sequence[Head], rng: np.random.Generator
) -> list[Head]:
    """As many random heads, layer by layer from the same or the nearest layers; [] when there are
    too few."""
    free = [
        h
        for h in model.heads
        if h not in set(heads) and h not in set(avoid) and h.tower == heads[0].tower
    ]
    if len(free) < len(heads):
        return []
    picks: list[Head] = []
    for head in heads:
        left = [h for h in free if h not in picks]
        nearest = min(abs(h.layer - head.layer) for h in left)
        pool = [h for h in left if abs(h.layer - head.layer) == nearest]
        picks.append(pool[int(rng.integers(len(pool)))])
    return sorted(picks)
