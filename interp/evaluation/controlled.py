"""An evaluation beside the same edits of random heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from interp.edits.head_edit import HeadEdit
from interp.edits.relocated import named_heads, relocated
from interp.errors import InputError
from interp.evaluation.ablation import controls
from interp.results.evaluation import Control, Evaluation
from interp.support.statistics import bootstrap
from interp.tasks.answers import Judging
from interp.tasks.task import Instance, Task
from interp_hooks.edit import Edit
from interp_hooks.model import HookedModel


class Once:
    """Judges answers, those of the untouched model once."""

    def __init__(self, judging: Judging):
        self.judging = judging
        self._plain: list[tuple[float, float]] | None = None

    def __call__(
        self,
        model: HookedModel,
        task: Task,
        instances: Sequence[Instance],
        edits: Sequence[Edit] = (),
        stepwise: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[tuple[float, float]]:
        if not edits and self._plain is not None:
            return self._plain
        found = self.judging(model, task, instances, edits, stepwise, progress)
        if not edits:
            self._plain = found
        return found


def controlled(
    model: HookedModel,
    edits: Sequence[Edit],
    draws: int,
    seed: int,
    measured: Callable[[Sequence[Edit], str], Evaluation],
) -> Evaluation:
    """What `measured` finds of `edits`, with the same of `draws` sets of random heads beside it.

    Each set has as many other heads of the same layers, or the nearest ones that have any left;
    what an edit says head by head goes with the head's place.

    Raises:
        InputError: edits that name no heads, or a model with too few others.
    """
    heads = named_heads(edits)
    if not heads:
        raise InputError(
            "Random heads stand beside edits that name query heads, and these name none; leave "
            "controls out."
        )
    rng = np.random.default_rng(seed)
    sets = [controls(model, heads, (), rng) for _ in range(draws)]
    if not all(sets):
        raise InputError(
            f"{model.name} has fewer other heads than the {len(heads)} that are edited, so there "
            "is no control."
        )
    found = measured(edits, "edited")
    frame = found.frame.copy()
    for i, others in enumerate(sets):
        places = dict(zip(heads, others, strict=True))
        moved = [relocated(edit, places) if isinstance(edit, HeadEdit) else edit for edit in edits]
        frame[f"control_{i}"] = measured(moved, f"random heads {i + 1} of {draws}").frame["edited"]
    columns = frame.filter(like="control_")
    mean = columns.mean(axis=1)
    control = Control(
        bootstrap((mean - frame.baseline).tolist(), seed),
        bootstrap((frame.edited - mean).tolist(), seed),
        [float((columns[c] - frame.baseline).mean()) for c in columns],
        [[str(h) for h in others] for others in sets],
    )
    return replace(found, frame=frame, control=control)
