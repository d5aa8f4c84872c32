"""Whether a model can do a task at all: what is asked before its circuit is looked for."""

from __future__ import annotations

import torch

from interp.circuits.runs.prompts import Prompts
from interp.errors import FloorError
from interp.support.statistics import Interval, bootstrap
from interp.tasks.answers import judge
from interp.tasks.floor import described
from interp_hooks.model import HookedModel

#: below this accuracy the user is told that the circuit is one of a task half done
POOR = 0.8


def able(
    model: HookedModel, prompts: Prompts, seed: int, force: bool = False
) -> tuple[Interval, Interval, str | None]:
    """(accuracy, margin, a remark where it was forced) on the clean prompts. Raises `FloorError`,
    unless forced, where the model does no better than chance: its answers are then not made by any
    circuit for the task."""
    with torch.no_grad():
        judged = judge(model, prompts.task, prompts.instances)
    accuracy = bootstrap([c for c, _ in judged], seed)
    margin = bootstrap([m for _, m in judged], seed)
    chance = prompts.task.chance
    if rivals(prompts):  # by chance, right answers beat wrong ones as often as not
        unsure = margin.low <= 0 and (accuracy.mean < POOR / 2 or prompts.task.judge == "mass")
        fails = margin.mean <= 0 or unsure or (chance > 0 and accuracy.mean <= chance)
    else:
        fails = accuracy.mean <= chance
    if not fails:
        return accuracy, margin, None
    found = described(model, prompts.task, prompts.instances, [c for c, _ in judged])
    if not force:
        raise FloorError(
            f"{found} The mean margin is {margin.mean:.2f}, so a circuit would mean nothing; try "
            "another format, task or model, or go on with --force (force=True)."
        )
    return accuracy, margin, f"{found} Searched all the same (force)."


def rivals(prompts: Prompts) -> bool:
    """Whether wrong answers are named; where not, the metric is a log-probability, always below
    0."""
    return any(prompts.instances[0].wrong)


def metric_of(prompts: Prompts) -> str:
    """What the metric is called: see `Task.score`."""
    if prompts.task.judge == "mass":
        return "probability difference"
    return "margin" if rivals(prompts) else "log-probability"
