"""A ranking against labels, in numbers: ROC and the area under it, average precision, what is
expected among the highest, and how sure each is.

Ties are never broken by chance: ROC and average precision take tied scores together, hits among the
highest are the expected number under a random order among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.errors import InputError
from interp.support.statistics import RESAMPLES

PERMUTATIONS = 2000
#: of the normal distribution, two-sided 95 %
Z = 1.959963984540054


def roc(scores: Any, positives: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(FPR, TPR, thresholds) of "score ≥ threshold" at ∞ and at each different score, from the
    highest down.

    Args:
        scores: (n,) numbers. positives: (n,) bool.

    Raises:
        InputError: NaN, different lengths, or one of the two classes is empty.
    """
    values, labels = (
        np.asarray(scores, dtype=np.float64).ravel(),
        np.asarray(positives).ravel().astype(bool),
    )
    if len(values) != len(labels):
        raise InputError(
            f"There are {len(values)} scores and {len(labels)} labels; give one label a score."
        )
    if np.isnan(values).any():
        raise InputError(
            f"{int(np.isnan(values).sum())} of {len(values)} scores are NaN; leave those out."
        )
    check_two_sided(labels)
    thresholds, group = np.unique(
        -values, return_inverse=True
    )  # ascending: the highest score first
    hits = np.bincount(group, labels)
    false = np.bincount(group, ~labels)
    tpr = np.concatenate([[0.0], np.cumsum(hits) / labels.sum()])
    fpr = np.concatenate([[0.0], np.cumsum(false) / (~labels).sum()])
    return fpr, tpr, np.concatenate([[np.inf], -thresholds])


@dataclass(frozen=True)
class Areas:
    """`auc` (by slopes: P[positive above negative] + ½ P[tie]), `pessimistic` (by steps), and
    `average_precision` = Σ precision_i (recall_i − recall_{i−1}) of a ranking."""

    auc: float
    pessimistic: float
    average_precision: float


def areas(values: np.ndarray, positives: np.ndarray) -> Areas:
    """The areas of a ranking. values (n,), positives (n,) bool. Raises `InputError` as `roc`."""
    fpr, tpr, _ = roc(values, positives)
    n, n_positive = len(values), int(positives.sum())
    hits = np.rint(tpr * n_positive)  # counts at each threshold: areas come out exact
    false_hits = np.rint(fpr * (n - n_positive))
    pairs = n_positive * (n - n_positive)
    return Areas(
        float(np.sum(np.diff(false_hits) * (hits[1:] + hits[:-1]) / 2) / pairs),
        float(np.sum((n - n_positive - false_hits[1:]) * np.diff(hits)) / pairs),
        float(np.sum(np.diff(tpr) * hits[1:] / (hits[1:] + false_hits[1:]))),
    )


def auc_of(values: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """(…,): the area under the ROC curve of each row of `values` (…, n), ties together."""
    from scipy.stats import rankdata

    k, n = int(positives.sum()), len(positives)
    places = rankdata(values, axis=-1)[..., positives].sum(-1)
    return (places - k * (k + 1) / 2) / (k * (n - k))


def hanley_mcneil(auc: float, n_positive: int, n_negative: int) -> tuple[float, float]:
    """95 % interval of an AUC over other heads like these (Hanley and McNeil 1982, formula 1):

        var = (A(1 − A) + (P − 1)(Q₁ − A²) + (N − 1)(Q₂ − A²)) / PN,
        Q₁ = A / (2 − A), Q₂ = 2A² / (1 + A)

    cut to [0, 1]. An AUC of exactly 0 or 1 has no width by this formula: with few positives that is
    too sure.
    """
    q1, q2 = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    var = auc * (1 - auc) + (n_positive - 1) * (q1 - auc**2) + (n_negative - 1) * (q2 - auc**2)
    half = Z * np.sqrt(max(var, 0.0) / (n_positive * n_negative))
    return max(0.0, auc - half), min(1.0, auc + half)


def auc_over_prompts(
    effects: np.ndarray, positives: np.ndarray, seed: int
) -> tuple[float, float] | None:
    """95 % interval of the AUC of |mean effect| with the prompts resampled: effects (heads, n).
    None for fewer than two prompts. A mean's magnitude is larger in resamples, so that what is
    null looks stronger there; the interval may miss the AUC itself."""
    from interp.support.statistics import resampled_means

    if effects.shape[1] < 2:
        return None
    means = np.abs(resampled_means(effects, seed)).T  # (resamples, heads)
    low, high = np.quantile(auc_of(means, positives), [0.025, 0.975])
    return float(low), float(high)


def difference(
    values: np.ndarray, others: Sequence[np.ndarray], positives: np.ndarray, seed: int
) -> tuple[float, float, float]:
    """(mean, low, high): AUC of `values` minus the mean AUC of `others` on the same heads, and its
    95 % interval with heads resampled, positives among themselves and negatives among themselves
    (paired: each resample is scored by all)."""
    rng = np.random.default_rng(seed)
    inside, outside = np.flatnonzero(positives), np.flatnonzero(~positives)
    rows = np.concatenate(
        [
            inside[rng.integers(0, len(inside), (RESAMPLES, len(inside)))],
            outside[rng.integers(0, len(outside), (RESAMPLES, len(outside)))],
        ],
        axis=1,
    )
    labels = np.arange(rows.shape[1]) < len(inside)

    def gap(pick: Any) -> np.ndarray:
        labelled = positives if pick is None else labels
        own = auc_of(values if pick is None else values[pick], labelled)
        rest = [auc_of(o if pick is None else o[pick], labelled) for o in others]
        return own - np.mean(rest, axis=0)

    low, high = np.quantile(gap(rows), [0.025, 0.975])
    return float(gap(None)), float(low), float(high)


def expected_hits(values: np.ndarray, positives: np.ndarray, k: int) -> float:
    """Expected positives among the `k` highest: those above the k-th score, and their share of
    those tied with it."""
    cut = np.sort(values)[::-1][k - 1]
    above, tied = values > cut, values == cut
    return float(positives[above].sum() + (k - above.sum()) * positives[tied].mean())


def p_value(values: np.ndarray, positives: np.ndarray, seed: int) -> float:
    """(1 + draws with a rank sum as high) / (1 + draws): AUC rises with the positives' rank sum."""
    from scipy.stats import rankdata

    place, k = rankdata(values), int(positives.sum())
    draws = np.random.default_rng(seed).random((PERMUTATIONS, len(values))).argsort(1)[:, :k]
    as_high = int((place[draws].sum(1) >= place[positives].sum()).sum())
    return (1 + as_high) / (1 + PERMUTATIONS)


def check_two_sided(positives: np.ndarray, what: str = "heads") -> None:
    """Raise `InputError` unless there are positives and negatives."""
    count = int(positives.sum())
    if count in (0, len(positives)):
        which = f"No {what} are" if count == 0 else f"All {what} are"
        raise InputError(
            f"{which} in the circuit, so a ranking can't be scored; give one with {what} in and "
            "out."
        )
