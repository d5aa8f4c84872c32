"""HeadHunter: heads chosen greedily for any objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interp.calibration.calibration_method import Found, Method, heads_of
from interp.calibration.greedy import greedy
from interp.calibration.splits import Bench, Outcome
from interp.errors import InputError
from interp.support.checkpoints import Record
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp_hooks.edit import Edit
    from interp_hooks.model import HookedModel

Factory = Callable[[tuple[Head, ...]], Sequence["Edit"]]
Objective = Callable[["HookedModel", Sequence["Edit"]], float]


def _ablate(heads: tuple[Head, ...]) -> list[Edit]:
    from interp.edits.ablate import Ablate

    return [Ablate(heads, "zero")]


def _scale(heads: tuple[Head, ...]) -> list[Edit]:
    from interp.edits.scale_heads import ScaleHeads

    return [ScaleHeads(dict.fromkeys(heads, 1.5))]


def _soft_pag(heads: tuple[Head, ...]) -> list[Edit]:
    from interp.edits.soft_pag import SoftPAG

    return [SoftPAG(1.0, heads)]


FACTORIES: dict[str, Factory] = {"ablate": _ablate, "scale": _scale, "soft_pag": _soft_pag}


@dataclass(frozen=True)
class HeadHunter(Method):
    """Greedy selection (HeadHunter, Ahn et al. 2025, arXiv 2506.10978): in each round every head
    left is tried together with those chosen, and the `top` best join them, as long as the objective
    rises by more than `gain`. Where the `top` together do not raise it, the best alone is tried.

    Args:
        using: what is done to the chosen heads: "ablate" (zero), "scale" (× 1.5), "soft_pag" (u =
            1), or heads → edits.
        objective: (model, edits) → number to maximise. By default accuracy on the training
            instances plus 0.01 × mean tanh(margin).
        rounds, top: at most that many rounds, heads a round. shortlist: after the first round only
            this many of its best heads are tried again; None for all.
        layers: None for all.

    Misleads:
        The same problems are looked at once a head and round, so the best of many trials looks good
        by chance. Read the held-out number.
    """

    using: str | Factory = "ablate"
    objective: Objective | None = None
    rounds: int = 3
    top: int = 1
    shortlist: int | None = None
    gain: float = 1e-6
    layers: Sequence[int] | None = None

    name = "headhunter"
    summary = "heads chosen greedily for an objective (HeadHunter)"
    citation = "Ahn et al. 2025, arXiv 2506.10978"

    def __post_init__(self) -> None:
        if isinstance(self.using, str) and self.using not in FACTORIES:
            raise InputError(
                f"headhunter can {', '.join(FACTORIES)} the heads, or use a function; not "
                f"{self.using!r}."
            )
        if (
            self.rounds < 1
            or self.top < 1
            or (self.shortlist is not None and self.shortlist < 1)
            or self.gain < 0
        ):
            raise InputError(
                "Rounds, top and shortlist of headhunter are at least 1, and the gain is not "
                "negative."
            )

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        return self.objective is None

    def edits(self, heads: Sequence[Head]) -> list[Edit]:
        """What is done to these heads; nothing to none."""
        make = FACTORIES[self.using] if isinstance(self.using, str) else self.using
        return list(make(tuple(heads))) if heads else []

    def find(self, bench: Bench) -> Found:
        import pandas as pd

        left = heads_of(bench.model, self.layers)
        for done in range(self.rounds):  # at most; a round that brings nothing is the last
            again = self.shortlist if done and self.shortlist else len(left)
            bench.plan(trials=max(0, min(len(left) - done * self.top, again)))
        best = self.score(bench, "train-untouched", [])
        hunted = greedy(
            left,
            lambda name, heads: self.score(bench, name, heads),
            best,
            rounds=self.rounds,
            top=self.top,
            shortlist=self.shortlist,
            gain=self.gain,
        )
        selection = hunted.heads
        notes = [] if selection else ["No head raises the objective; there is nothing to edit."]
        return Found(self.edits(selection), pd.DataFrame(hunted.rows), notes=notes)

    def score(self, bench: Bench, key: str, heads: Sequence[Head]) -> float:
        """The objective with these heads edited."""
        what = " ".join(map(str, heads[-self.top :])) or "untouched"
        if self.objective is None:
            return usual(bench(key, self.edits(heads), what))
        key = f"objective-{key}"
        if not bench.pieces.has(key):
            value = float(self.objective(bench.model, self.edits(heads)))
            if not math.isfinite(value):
                raise InputError(
                    f"The objective gave {value} with {what} edited; it must be a finite number."
                )
            bench.pieces.save(key, [Record("objective", 0, "", "trial", 0, 0, value)])
        bench.step(what, len(bench.train))
        return float(bench.pieces.records([key]).value.iloc[0])


def usual(outcome: Outcome) -> float:
    """Accuracy + 0.01 × mean tanh(margin), so that margins decide between equal accuracies."""
    import numpy as np

    return float(outcome.correct.mean() + 0.01 * np.tanh(outcome.margin).mean())
