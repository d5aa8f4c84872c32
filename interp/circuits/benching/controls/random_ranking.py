"""A random ranking of heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.paired_runs import PairedRuns


@dataclass(frozen=True)
class RandomRanking(Method):
    """score(h) is drawn from 0 to 1, by the seed of the search.

    Misleads:
        One draw may agree with a small circuit by luck; the p of an `Agreement` is of 2,000.
    """

    name = "random_ranking"
    title = "Random ranking"
    summary = "random numbers"
    reading = "A random number."
    formula = "uniform(0, 1)"
    citation = "control"

    def shuffles(self) -> tuple[str, ...]:
        return ()

    def find(self, runs: PairedRuns) -> Found:
        return Found(np.random.default_rng(runs.seed).random(len(runs.heads)))
