"""Whether a model can do a task at all: no result is drawn from one that can't."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import TYPE_CHECKING

from interp.errors import FloorError
from interp.tasks.answers import said
from interp.tasks.task import Instance, Task

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

#: what a model that can't do it may hit now and then, where guessing hits nothing
LUCK = 0.01
#: at the floor: so many hits come about by guessing in more than one of five cases
LEVEL = 0.2
#: characters shown of the end of a prompt
END = 60


def at_floor(hits: float, n: int, chance: float) -> bool:
    """Whether `hits` of `n` may be mere guessing: P(X ≥ hits) > 0.2, X binomial with n and
    the chance of guessing right (at least 0.01).

    Example:
        >>> from interp.tasks.floor import at_floor
        >>> at_floor(0, 64, 0.0), at_floor(3, 64, 0.0), at_floor(33, 64, 0.5)
        (True, False, True)
    """
    p, least = max(chance, LUCK), round(hits)
    above = sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(least, n + 1))
    return above > LEVEL


def check_floor(
    model: HookedModel,
    task: Task,
    instances: Sequence[Instance],
    correct: Sequence[float],
    force: bool = False,
) -> str | None:
    """None where the model does the task better than by guessing.

    Else raises `FloorError` with the accuracy, the end of a prompt, the answer wanted and what the
    model said; with `force` it returns that sentence, to stand beside the result.
    """
    if not at_floor(sum(correct), len(correct), task.chance):
        return None
    sentence = described(model, task, instances, correct)
    if force:
        return f"{sentence} Measured all the same (force)."
    raise FloorError(f"{sentence} Try another format or model, or go on with --force (force=True).")


def described(
    model: HookedModel, task: Task, instances: Sequence[Instance], correct: Sequence[float]
) -> str:
    """A failure in words: accuracy, a prompt's end, what was wanted, what was said."""
    mean = sum(correct) / len(correct)
    guess = f"guessing gives {task.chance:.2f}" if task.chance else "guessing gives none"
    i = min(range(len(correct)), key=lambda k: correct[k])
    decode = model.tokenizer.decode
    end = decode(list(instances[i].prompt))[-END:]
    wanted = decode([tokens[0] for tokens in instances[i].accept])
    return (
        f"{model.name} can't do {task.name} in the format {task.format}: accuracy {mean:.2f} of "
        f"{len(correct)} ({guess}). After {end!r} it should say {wanted!r} and said "
        f"{said(model, instances[i])!r}."
    )
