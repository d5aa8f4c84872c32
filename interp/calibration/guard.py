"""Many heads are tried and some look good by chance: paired tests, and a guard for their number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def sign_test(differences: Sequence[float] | np.ndarray) -> float:
    """One-sided exact sign test that differences are positive: P[Binomial(m, ½) ≥ positives], m the
    non-zero ones.

    With differences of right (1) and wrong (0) answers this is McNemar's exact test, one-sided.
    """
    array = np.asarray(differences, dtype=np.float64)
    better, worse = int((array > 0).sum()), int((array < 0).sum())
    total = better + worse
    return sum(math.comb(total, k) for k in range(better, total + 1)) / 2**total


def adjusted(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Benjamini–Hochberg adjusted p-values (J. R. Stat. Soc. B 57, 1995): keeping those ≤ q holds
    the expected share of false ones among the kept below q (independent or positively dependent
    tests)."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    ranked = values[order] * len(values) / np.arange(1, len(values) + 1)
    found = np.empty_like(values)
    found[order] = np.minimum.accumulate(ranked[::-1])[::-1].clip(max=1.0)
    return found
