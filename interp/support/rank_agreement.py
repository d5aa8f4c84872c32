"""How far two columns of numbers rank alike: Spearman's ρ, Kendall's τ and the overlap of the
strongest, each with an interval and with what a random order would give.

Intervals are 95 % percentile bootstraps: over the places, or over the samples that each place was
measured on. The control shuffles one column: the overlap of two random sets is hypergeometric, so
its mean and p are exact, and ρ's p is by permutation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from interp.support.statistics import kendall, spearman

RESAMPLES = 1000
PERMUTATIONS = 2000
#: numbers in one block of pairs, so that thousands of heads fit into the memory
BLOCK = 4_000_000
#: a resample in which a column is constant has no ρ; beyond this share there is no interval
UNDEFINED = 0.05

Low = tuple[float | None, float | None]


@dataclass(frozen=True)
class RankAgreement:
    """ρ, τ and overlap with their intervals and controls; None where one is not defined.

    `overlap` is the share of the `k` strongest of the first that are among the k strongest of the
    second; `expected` is k/n, what two random sets of k share on average, `overlap_p` the chance
    that these share as many or more; `spearman_p` the two-sided share of shuffles whose |ρ| is as
    large.
    """

    n: int
    k: int
    spearman: float | None
    spearman_interval: Low
    spearman_p: float | None
    kendall: float | None
    kendall_interval: Low
    overlap: float | None
    overlap_interval: Low
    expected: float | None
    overlap_p: float | None


def agreement(
    a: np.ndarray,
    b: np.ndarray,
    k: int,
    samples: tuple[Sequence[Sequence[float]] | None, Sequence[Sequence[float]] | None] = (
        None,
        None,
    ),
    seed: int = 0,
) -> RankAgreement:
    """How far two columns agree.

    Args:
        a, b: (n,) finite numbers of the same places.
        k: how many of the strongest are held against each other; at most n.
        samples: for either column, the numbers in each sample of each place; where one is given,
            the intervals are over samples.
        seed: of resamples and shuffles.
    """
    n = len(a)
    k = min(k, n)
    rng = np.random.default_rng(seed)
    shared = len(strongest(a, k) & strongest(b, k))
    rho, tau = spearman(a, b), kendall(a, b)
    if any(s is not None for s in samples):
        draws = _over_samples(a, b, k, samples, rng)
    else:
        draws = _over_places(a, b, k, rng)
    rhos, taus, overlaps = draws
    return RankAgreement(
        n,
        k,
        _known(rho),
        _interval(rhos) if math.isfinite(rho) else (None, None),
        None if math.isnan(rho) else permutation_p(a, b, rho, rng),
        _known(tau),
        _interval(taus) if math.isfinite(tau) else (None, None),
        shared / k if k else None,
        _interval(overlaps) if k else (None, None),
        k / n if k else None,
        overlap_p(shared, k, n) if k else None,
    )


def strongest(values: np.ndarray, k: int) -> set[int]:
    """Indices of the k largest; ties by index."""
    return set(np.argsort(-values, kind="stable")[:k].tolist())


def overlap_p(shared: int, k: int, n: int) -> float:
    """P(two random sets of k among n share `shared` or more): hypergeometric, exact."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(shared - 1, n, k, k))


def permutation_p(a: np.ndarray, b: np.ndarray, rho: float, rng: np.random.Generator) -> float:
    """Two-sided: (1 + shuffles with |ρ| at least as large) / (1 + shuffles)."""
    from scipy.stats import rankdata

    x, y = (rankdata(v) - (len(a) + 1) / 2 for v in (a, b))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    larger = 0
    rows = max(1, BLOCK // len(a))
    for start in range(0, PERMUTATIONS, rows):
        many = min(rows, PERMUTATIONS - start)
        shuffled = rng.permuted(np.broadcast_to(y, (many, len(y))), axis=1)
        larger += int((np.abs(shuffled @ x) >= abs(rho) - 1e-12).sum())
    return (1 + larger) / (1 + PERMUTATIONS)


def _over_places(
    a: np.ndarray, b: np.ndarray, k: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ρ, τ and overlaps of resamples of the places.

    A place drawn c times counts as c places that tie with each other, so resamples are counts, and
    ranks and pairs are sums of counts. Of the overlap the k strongest of the first are resampled.
    """
    n = len(a)
    hits = np.array([i in strongest(b, k) for i in np.argsort(-a, kind="stable")[:k]], dtype=float)
    overlaps = hits[rng.integers(0, max(k, 1), (RESAMPLES, k))].mean(1) if k else np.empty(0)
    if n < 2:
        return np.empty(0), np.empty(0), overlaps
    counts = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
    return _weighted_rho(a, b, counts), _weighted_tau(a, b, counts), overlaps


def _group_counts(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) which distinct value each place has, and (draws, distinct values) how often each was
    drawn, in rising order."""
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    first = np.searchsorted(group[order], np.arange(len(distinct)))
    return group, np.add.reduceat(counts[:, order], first, axis=1)


def _weighted_rho(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(draws,) Spearman's ρ of places that stand `counts` times."""
    centred = []
    n = counts.shape[1]
    for values in (a, b):
        group, drawn = _group_counts(values, counts)
        rank = np.cumsum(drawn, axis=1) - drawn / 2 - n / 2  # average rank of a tie, centred
        centred.append(rank[:, group])
    x, y = centred
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts * x * y).sum(1) / np.sqrt((counts * x * x).sum(1) * (counts * y * y).sum(1))


def _weighted_tau(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(draws,) Kendall's τ_b of places that stand `counts` times."""
    n = counts.shape[1]
    drawn = counts.astype(np.float32)  # sums of signs are whole numbers below 2²⁴
    concordant = np.zeros(len(counts))
    rows = max(1, BLOCK // n)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        signs = np.sign(a[part, None] - a) * np.sign(b[part, None] - b)  # (rows, n)
        sums = drawn @ signs.astype(np.float32).T  # (draws, rows)
        concordant += (counts[:, part] * sums).sum(1)
    untied = [n * n - (_group_counts(v, counts)[1] ** 2).sum(1) for v in (a, b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return concordant / np.sqrt(untied[0] * untied[1])


def _over_samples(
    a: np.ndarray,
    b: np.ndarray,
    k: int,
    samples: tuple[Sequence[Sequence[float]] | None, Sequence[Sequence[float]] | None],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ρ, τ and overlaps of columns whose samples were drawn anew; a column without samples
    stays."""
    draws = RESAMPLES // 2
    columns = [
        np.broadcast_to(fixed, (draws, len(fixed))) if drawn is None else _means(drawn, draws, rng)
        for fixed, drawn in zip((a, b), samples, strict=True)
    ]
    pairs = list(zip(*columns, strict=True))
    measures: list[Callable[[np.ndarray, np.ndarray], float]] = [
        spearman,
        kendall,
        lambda x, y: len(strongest(x, k) & strongest(y, k)) / k if k else math.nan,
    ]
    rho, tau, overlap = (np.array([measure(x, y) for x, y in pairs]) for measure in measures)
    return rho, tau, overlap


def _means(samples: Sequence[Sequence[float]], draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, n) means over samples drawn anew: the same ones for all places where each has as
    many, so that what they share stays shared; else drawn for each."""
    lengths = {len(values) for values in samples}
    if len(lengths) == 1:
        size = lengths.pop()
        weights = rng.multinomial(size, np.full(size, 1 / size), size=draws) / size
        return weights @ np.asarray(samples, dtype=np.float64).T
    means = np.empty((draws, len(samples)))
    for place, values in enumerate(samples):
        size = len(values)
        means[:, place] = np.asarray(values)[rng.integers(0, size, (draws, size))].mean(1)
    return means


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(draws: np.ndarray) -> Low:
    """The middle 95 % of the draws; (None, None) where too many have no value."""
    finite = draws[np.isfinite(draws)]
    if len(finite) < (1 - UNDEFINED) * len(draws) or not len(finite):
        return None, None
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)
