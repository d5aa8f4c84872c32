"""Seconds and bytes of a forward as a sum of what grows with it, fitted to measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fit:
    """y = Σ c_k x_k with c_k ≥ 0, fitted to measured values by their relative errors.

    Attributes:
        coefficients: c.
        error: the largest relative error over the measured values when each is told by the fit to
            all the others; NaN with fewer than three.
        typical: the median of the same.
        n: how many values.
    """

    coefficients: tuple[float, ...]
    error: float
    typical: float
    n: int

    def __call__(self, features: Sequence[float]) -> float:
        return float(np.dot(self.coefficients, features))


def fit(rows: Sequence[Sequence[float]], values: Sequence[float]) -> Fit:
    """The fit of positive values by features (n, k).

    Example:
        >>> from interp.costs.fit import fit
        >>> found = fit([[1.0, 1.0], [2.0, 4.0], [3.0, 9.0], [4.0, 16.0]], [5.0, 14.0, 27.0, 44.0])
        >>> [round(c, 6) for c in found.coefficients], round(found.error, 6)
        ([3.0, 2.0], 0.0)
    """
    x, y = np.asarray(rows, dtype=np.float64), np.asarray(values, dtype=np.float64)
    whole = _solve(x, y)
    errors = []
    for i in range(len(y)) if len(y) > 2 else ():
        others = np.arange(len(y)) != i
        errors.append(abs(float(x[i] @ _solve(x[others], y[others])) / y[i] - 1))
    error, typical = (max(errors), float(np.median(errors))) if errors else (np.nan, np.nan)
    return Fit(tuple(whole.tolist()), float(error), float(typical), len(y))


def _solve(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares of relative errors without negative coefficients; columns are scaled first, as
    they differ by many orders of magnitude."""
    from scipy.optimize import nnls

    relative = x / y[:, None]
    scale = np.maximum(np.abs(relative).max(0), 1e-300)
    return nnls(relative / scale, np.ones(len(y)))[0] / scale
