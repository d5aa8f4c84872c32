"""Means with bootstrap intervals, McNemar's exact test, and rank correlation.

scipy is imported where it is used: it takes half a second.
"""

from __future__ import annotations

import math
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


def mean_and_error(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over rows (rows, columns), NaN left out."""
    count = np.isfinite(table).sum(0)
    mean = np.where(count > 0, np.nansum(table, 0) / np.maximum(count, 1), np.nan)
    square = np.nansum((table - mean) ** 2, 0) / np.maximum(count - 1, 1)
    return mean, np.where(count > 1, np.sqrt(square / np.maximum(count, 1)), np.nan)


def resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    """(rows, resamples): means of `values` (rows, n) over bootstrap samples of the n, the same for
    all rows."""
    n = values.shape[1]
    rng = np.random.default_rng(seed)
    # how often each is drawn, rather than the draws: (resamples, n)
    counts = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return values @ counts.T / n


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
    from scipy.stats import binomtest

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
    return McNemar(better, worse, float(binomtest(better, n).pvalue) if n else 1.0)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's ρ, ties averaged; NaN where one is constant or has fewer than two values."""
    from scipy.stats import spearmanr

    return math.nan if _undefined(a, b) else float(spearmanr(a, b).statistic)


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's τ_b (Kendall 1945); NaN where one is constant or has fewer than two values."""
    from scipy.stats import kendalltau

    return math.nan if _undefined(a, b) else float(kendalltau(a, b).statistic)


def _undefined(a: np.ndarray, b: np.ndarray) -> bool:
    """Where scipy warns of a rank correlation, or refuses."""
    return len(a) < 2 or bool(np.ptp(a) == 0 or np.ptp(b) == 0)
