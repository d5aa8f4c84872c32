"""What a calibrated edit costs elsewhere: on needles in haystacks, and in the loss of English."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from interp.calibration.calibration import Change
from interp.errors import ContextError, InputError
from interp.evaluation.accuracy import by_steps, sample
from interp.evaluation.loss import continuation_loss, rows_for_loss
from interp.tasks.answers import judge
from interp.tasks.floor import at_floor
from interp.tasks.niah import NeedleInAHaystack
from interp.tasks.task import Task

if TYPE_CHECKING:
    from interp_hooks.edit import Edit
    from interp_hooks.model import HookedModel

#: problems, and the tokens of each
NEEDLES, LENGTH = 16, 512
#: rows of text, and the tokens of each; the second half is judged
ROWS, TOKENS = 8, 256


def elsewhere(
    model: HookedModel, task: Task, edits: Sequence[Edit], seed: int
) -> tuple[dict[str, Change], list[str]]:
    """("needles" and "loss" → untouched against edited, why one of them is missing).

    Needles at 512 tokens (or the model's limit), exact answers; the loss is of the second half of
    rows of 256 tokens given the first, in nats a token. Nothing for no edits.
    """
    found: dict[str, Change] = {}
    notes: list[str] = []
    if not edits:
        return found, notes
    for name, measure in (("needles", _needles), ("loss", _loss)):
        if name == "needles" and isinstance(task, NeedleInAHaystack):
            continue
        try:
            found[name] = measure(model, edits, seed)
        except (InputError, ContextError) as reason:
            notes.append(f"What it costs in {name} was not measured: {reason}")
    return found, notes


def _needles(model: HookedModel, edits: Sequence[Edit], seed: int) -> Change:
    task = NeedleInAHaystack().exactly(min(LENGTH, model.max_context or LENGTH))
    posed, problems = sample(model, task, NEEDLES, seed, format="auto")
    before = np.array([c for c, _ in judge(model, posed.task, problems)])
    if at_floor(before.sum(), NEEDLES, 0.0):
        raise InputError(f"the model finds {int(before.sum())} of {NEEDLES} needles untouched.")
    after = np.array([c for c, _ in judge(model, posed.task, problems, edits, by_steps(edits))])
    return Change.of(before, after, seed)


def _loss(model: HookedModel, edits: Sequence[Edit], seed: int) -> Change:
    length = min(TOKENS, model.max_context or TOKENS)
    rows = rows_for_loss(model, None, None, length, ROWS, seed)
    found = continuation_loss(model, rows, edits, seed=seed)
    assert found.edited is not None and found.difference is not None
    return Change(found.baseline, found.edited, found.difference)
