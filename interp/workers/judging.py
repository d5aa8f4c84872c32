"""Answers to a task's problems judged by workers: the batches of one process, shared out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

from interp.errors import InputError
from interp.support.checkpoints import Piece
from interp.support.provenance import provenance
from interp.tasks.answers import judged, together
from interp.workers.work import Opened, Work

if TYPE_CHECKING:
    from interp.tasks.task import Instance, Task
    from interp_hooks.edit import Edit
    from interp_hooks.model import HookedModel

#: pieces a worker, so that no one waits long for the last
EACH = 4


@dataclass(frozen=True)
class JudgeWork(Work):
    """Problems that are judged under edits; a piece is a range of their batches, "0-3"."""

    task: Task
    instances: Sequence[Instance]
    edits: Sequence[Edit]
    stepwise: bool

    def open(self, model: HookedModel) -> Judged:
        return Judged(model, self)


class Judged(Opened):
    """The same on a model."""

    def __init__(self, model: HookedModel, work: JudgeWork):
        self._model, self._work = model, work
        #: the instances of each batch, in order
        self.groups = together(work.task, work.instances)

    def record(self) -> dict[str, Any]:
        work = self._work
        settings = dict(judge=work.task.judge, steps=work.stepwise, backend=self._model.backend)
        inputs = [*(torch.tensor(i.ids) for i in work.instances), list(work.instances)]
        return provenance(self._model, 0, settings, inputs, [work.task, *work.edits])

    def do(self, key: str) -> list[tuple[float, float]]:
        start, stop = map(int, key.split("-"))
        work = self._work
        groups = self.groups[start:stop]
        with self._model.clean():
            return judged(self._model, work.task, work.instances, groups, work.edits, work.stepwise)


class Workers(Protocol):
    """Who does pieces of a run (`interp.cluster`)."""

    def count(self, model: HookedModel) -> int:
        """How many there are for this model."""

    def done(
        self,
        model: HookedModel,
        work: Work,
        record: Mapping[str, Any],
        pieces: Sequence[Piece],
        progress: Callable[[int, int, str], None] | None,
    ) -> dict[str, Any]:
        """What the pieces give, by key; without those for which memory ran out."""


class SharedJudge:
    """Judges answers by the workers of a cluster, as `interp.tasks.answers.judge` does: the same
    batches, so the same numbers."""

    def __init__(self, workers: Workers):
        self._workers = workers

    def __call__(
        self,
        model: HookedModel,
        task: Task,
        instances: Sequence[Instance],
        edits: Sequence[Edit] = (),
        stepwise: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[tuple[float, float]]:
        if model.gives_caches:
            raise InputError(
                "The caches of a block (model.caching) are in this process, and workers would "
                "answer without them; evaluate in one process."
            )
        work = JudgeWork(task, tuple(instances), tuple(edits), stepwise)
        run = work.open(model)
        sizes = [sum(len(instances[i].ids) for i in group) for group in run.groups]
        keys = ranges(sizes, EACH * self._workers.count(model))
        pieces = [
            Piece(f"{a}-{b}", "problems", sum(sizes[a:b]) / 1000, saved=False) for a, b in keys
        ]
        found = self._workers.done(model, work, run.record(), pieces, _counted(progress, instances))
        scores = [s for p in pieces for s in (found.get(p.key) or run.do(p.key))]
        order = [i for group in run.groups for i in group]
        return [score for _, score in sorted(zip(order, scores, strict=True))]


def ranges(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """(start, stop) of `most` ranges or fewer, of about as much each, none of them empty."""
    if not sizes:
        return []
    total, sums = sum(sizes), [0]
    for size in sizes:
        sums.append(sums[-1] + size)
    edges = {0, len(sizes)}
    for k in range(1, most):
        edges.add(min(range(len(sums)), key=lambda i: abs(sums[i] - total * k / most)))
    return list(pairwise(sorted(edges)))


def _counted(
    progress: Callable[[int], None] | None, instances: Sequence[Instance]
) -> Callable[[int, int, str], None] | None:
    """Progress over pieces as one over instances."""
    if progress is None:
        return None
    return lambda done, total, what: progress(-(-len(instances) * done // max(1, total)))
