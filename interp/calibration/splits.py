"""The instances that settings are chosen on, those they are reported on, and how the model fares
under edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from interp.errors import InputError
from interp.evaluation.accuracy import sample
from interp.inputs.tokenizer import pad_id
from interp.support.checkpoints import Checkpoints, Record
from interp.tasks.answers import answer_logits, batches
from interp.tasks.task import Instance, Task

if TYPE_CHECKING:
    from interp_hooks.edit import Edit
    from interp_hooks.model import HookedModel

Progress = Callable[[int, int, str], None]
#: fewer instances than this say nothing about an accuracy
LEAST = 8
#: held-out instances are drawn from this far down the seeds
APART = 1 << 20
COLUMNS = ("correct", "margin", "entropy")


@dataclass(frozen=True)
class Split:
    """Training and held-out instances of a task; no prompt is in both. `note`: on the choice of a
    format."""

    task: Task
    train: list[Instance]
    heldout: list[Instance]
    note: str | None = None


def split(
    model: HookedModel,
    task: str | Task,
    n: int,
    heldout: int | None,
    seed: int,
    labels: bool = True,
    format: str | None = None,
) -> Split:
    """`n` training and `heldout` other instances. Raises `InputError` when there are too few, or
    (with `labels`) when all have the same answer."""
    heldout = n if heldout is None else heldout
    if n < LEAST or heldout < LEAST:
        raise InputError(
            f"A calibration needs {LEAST} training and {LEAST} held-out instances; use n ≥ {LEAST}."
        )
    posed, train = sample(model, task, n, seed, format=format)
    chosen = posed.task
    if labels and len({i.accept for i in train}) < 2:
        raise InputError(
            f"All {n} calibration instances of {chosen.name} have the same answer, so no setting "
            "can be judged by "
            "them; use more instances, another seed or another task."
        )
    prompts = {i.prompt for i in train}
    others: dict[tuple[int, ...], Instance] = {}
    for spare in (1, 2, 4):
        for instance in chosen.sample(model.tokenizer, spare * heldout, seed + APART):
            if instance.prompt not in prompts:
                others.setdefault(instance.prompt, instance)
        if len(others) >= heldout:
            return Split(chosen, train, list(others.values())[:heldout], posed.note)
    raise InputError(
        f"The task {chosen.name} has only {len(others)} instances beside the {n} to calibrate on, "
        f"and {heldout} "
        "held-out ones were asked for; use fewer."
    )


@dataclass(frozen=True)
class Outcome:
    """How the instances came out under some edits, each (n,): `correct` 0 … 1, `margin` as
    `Task.score` says, `entropy` (nats) of the next-token distribution after the prompt, which takes
    no labels."""

    correct: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray

    @property
    def standing(self) -> tuple[float, float]:
        """(accuracy, mean margin): accuracies are compared first, margins break ties."""
        return float(self.correct.mean()), float(self.margin.mean())


class Bench:
    """A model at work on a split; each outcome is saved when it is there, so that an interrupted
    run resumes."""

    def __init__(
        self,
        model: HookedModel,
        split: Split,
        seed: int,
        pieces: Checkpoints,
        progress: Progress | None = None,
    ):
        self.model, self.task, self.seed, self.pieces = model, split.task, seed, pieces
        self.train, self.heldout = split.train, split.heldout
        self._progress = progress
        self._done = self._total = 0

    def plan(self, trials: int = 0, steps: int = 0) -> None:
        """Expect that many more trials on the training instances, and other steps, each worth one
        instance."""
        self._total += trials * len(self.train) + steps

    def expect(self, instances: int) -> None:
        """Expect that many more instances."""
        self._total += instances

    def step(self, what: str, more: int = 0) -> None:
        """Report progress, `more` units further."""
        self._done += more
        if self._progress is not None:
            self._progress(self._done, max(self._total, self._done), what)

    def __call__(
        self, key: str, edits: Sequence[Edit], what: str = "", heldout: bool = False
    ) -> Outcome:
        """The outcome on the training (or held-out) instances, from disk where `key` was finished
        before."""
        instances = self.heldout if heldout else self.train
        if self.pieces.has(key):
            self.step(what, len(instances))
        else:
            outcome = self._run(instances, edits, what)
            self.pieces.save(key, [
                Record(name, i, "", "trial", 0, 0, float(value))
                for name in COLUMNS
                for i, value in enumerate(getattr(outcome, name))
            ])  # fmt: skip
        frame = self.pieces.records([key])
        return Outcome(*(frame[frame.score == name].value.to_numpy(np.float64) for name in COLUMNS))

    def _run(self, instances: Sequence[Instance], edits: Sequence[Edit], what: str) -> Outcome:
        rows: list[tuple[float, float, float]] = []
        # edits of prefill or decode alone need the answer fed step by step; an answer of one token
        # is no step
        steps = any(e.scope != "all" for e in edits) and any(
            len(i.prompt) < len(i.ids) for i in instances
        )
        self.step(what)
        with self.model.edit(*edits):
            for batch in batches(instances, pad_id(self.model.tokenizer)):
                for instance, logits in zip(
                    batch.instances, answer_logits(self.model, batch, steps), strict=True
                ):
                    rows.append((*self.task.score(logits, instance), entropy(logits[0])))
                self.step(what, len(batch.instances))
        return Outcome(*np.array(rows, dtype=np.float64).T)


def entropy(logits: torch.Tensor) -> float:
    """−Σ p ln p of softmax(logits), (vocabulary,)."""
    log_p = torch.log_softmax(logits.double(), -1)
    return float(-(log_p.exp() * log_p).sum())
