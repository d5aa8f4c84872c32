"""Which format a model understands: each tried on a few short problems, the best taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from interp.errors import ContextError, InputError
from interp.inputs.context import check_context
from interp.inputs.tokenizer import Text
from interp.tasks.answers import judge
from interp.tasks.formats import ORDER, check_format
from interp.tasks.task import Task

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

#: problems that a format is tried on
TRIALS = 8
#: seed of those problems: the choice must not hang on the problems that are measured afterwards
SEED = 20260
#: a later format is taken only where it solves this many more: one of eight is chance
BETTER = 2


@dataclass(frozen=True)
class Posed:
    """A task in the format that a model is asked in.

    Attributes:
        task: the task, its format fixed.
        solved: format → problems solved, of those tried.
        trials: how many were tried in each.

    Example:
        >>> interp.tasks.pose(model, interp.tasks.get("ioi")).note
        'ioi: asked in the format bare, which solved 8 of 8 trial problems beforehand'
    """

    task: Task
    solved: Mapping[str, int]
    trials: int = TRIALS

    @property
    def note(self) -> str | None:
        """Which format was taken and how many trial problems it solved, which are not those that
        are measured, and the others' numbers; None where there was nothing to choose."""
        if not self.solved:
            return None
        mine = self.solved[self.task.format]
        others = ", ".join(f"{f} {k}" for f, k in self.solved.items() if f != self.task.format)
        line = (
            f"{self.task.name}: asked in the format {self.task.format}, which solved {mine} of "
            f"{self.trials} trial problems beforehand"
        )
        return f"{line} ({others})" if others else line


def pose(model: HookedModel, task: Task, format: str = "auto") -> Posed:
    """The task in a format: the one named, or by "auto" the one that this model solves best.

    Formats are tried in the order bare, lead, few-shot, chat on `TRIALS` short problems of a seed
    of their own; the first that solves all of them ends the search, and a later one must solve
    `BETTER` more than an earlier to be taken.

    Args:
        model: the model.
        task: the task.
        format: "auto", or one of `task.formats`.

    Raises:
        InputError: the task has no such format, or this tokenizer no chat template.

    Example:
        >>> from interp.tasks.posing import pose
        >>> pose(model, interp.tasks.get("induction")).task.format
        'bare'
    """
    if format != "auto":
        check_format(task.name, format, task.formats)
        return Posed(replace(task, format=format) if format != task.format else task, {})
    open_to = [f for f in ORDER if f in task.formats and f != "paper"]
    if not Text(model.tokenizer).has_chat:
        open_to = [f for f in open_to if f != "chat"]
    if len(open_to) < 2:
        return Posed(task, {})
    solved: dict[str, int] = {}
    for one in open_to:
        found = _solved(model, replace(task, format=one))
        if found is not None:
            solved[one] = found
        if found == TRIALS:
            break
    if not solved:
        return Posed(task, {})  # what is in the way is told where the problems are made
    best = next(iter(solved))
    for one, count in solved.items():
        if count >= solved[best] + BETTER:
            best = one
    return Posed(replace(task, format=best), solved)


def _solved(model: HookedModel, task: Task) -> int | None:
    """How many of the short problems are solved; None where they can't be posed."""
    try:
        problems = task.brief().sample(model.tokenizer, TRIALS, SEED)
        check_context(model, max(len(p.ids) for p in problems))
    except (InputError, ContextError):
        return None
    return sum(correct > 0.5 for correct, _ in judge(model, task, problems))
