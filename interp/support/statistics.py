"""Means with bootstrap intervals, McNemar's exact test, and rank correlation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean over `n` instances with its 95 % percentile-bootstrap interval [low, high]."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean and 95 % interval over resampled instances. For a difference, pass per-instance
    differences (paired)."""
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = array[rng.integers(0, len(array), (RESAMPLES, len(array)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high), len(array))


@dataclass(frozen=True)
class McNemar:
    """Of paired right-or-wrong answers: how many became right (`better`) and wrong (`worse`), and
    the exact p-value."""

    better: int
    worse: int
    p: float

    def __str__(self) -> str:
        return f"p = {self.p:.3g} ({self.better} better, {self.worse} worse)"


def mcnemar(before: Sequence[float], after: Sequence[float]) -> McNemar | None:
    """McNemar's exact test: two-sided binomial, p = 1/2, on the discordant pairs. None unless all
    values are 0 or 1."""
    if len(before) != len(after):
        raise ValueError(
            f"Paired answers are as many before as after, not {len(before)} and {len(after)}."
        )
    pairs = list(zip(before, after, strict=True))
    if any(value not in (0, 1) for pair in pairs for value in pair):
        return None
    better = sum(a > b for b, a in pairs)
    worse = sum(a < b for b, a in pairs)
    n = better + worse
    tail, ways = 0, 1  # whole numbers: exact up to the division
    for k in range(min(better, worse) + 1):
        tail, ways = tail + ways, ways * (n - k) // (k + 1)  # ways: n over k
    return McNemar(better, worse, min(1.0, 2 * tail / 2**n))


def spearman(a: np.ndarray, b: np.ndarray) -> tuple[float | None, str]:
    """Spearman's ρ, or None and the reason there is none."""
    if len(a) < 2:
        return None, "measured in fewer than two heads of both"
    flat = [name for name, values in (("first", a), ("second", b)) if np.ptp(values) == 0]
    if flat:
        return None, f"the same for all heads in the {' and the '.join(flat)}"
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1]), ""


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties averaged."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]
