"""Rank correlation of two orderings of tokens."""

from __future__ import annotations

import math

import numpy as np

from interp.support.statistics import spearman


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's τ_b (Kendall 1945): (concordant − discordant) / √((n₀ − n₁)(n₀ − n₂)), n₀ = n(n −
    1)/2, n₁ and n₂ the pairs tied in a and in b. NaN where one of them is constant or has fewer
    than two values. O(n²)."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    upper = np.triu_indices(len(a), 1)
    x, y = (np.sign(v[:, None] - v[None])[upper] for v in (a, b))
    size = math.sqrt(float(np.count_nonzero(x)) * float(np.count_nonzero(y)))
    return float((x * y).sum() / size) if size else math.nan


def rho(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's ρ, ties averaged; NaN where it is not defined."""
    found, _ = spearman(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    return math.nan if found is None else found
