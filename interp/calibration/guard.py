"""Many heads are tried and some look good by chance: paired tests, and a guard for their number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sign_test(differences: Sequence[float] | np.ndarray) -> float:
    """One-sided exact sign test that differences are positive: P[Binomial(m, ½) ≥ positives], m the
    non-zero ones.

    With differences of right (1) and wrong (0) answers this is McNemar's exact test, one-sided.
    """
    from scipy.stats import binomtest

    array = np.asarray(differences, dtype=np.float64)
    better, worse = int((array > 0).sum()), int((array < 0).sum())
    total = better + worse
    return float(binomtest(better, total, alternative="greater").pvalue) if total else 1.0


def adjusted(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Benjamini–Hochberg adjusted p-values (J. R. Stat. Soc. B 57, 1995): keeping those ≤ q holds
    the expected share of false ones among the kept below q (independent or positively dependent
    tests)."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(np.asarray(p, dtype=np.float64), method="bh"))
