"""Areas under curves of circuits: MIB's CPR and CMD."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from interp.errors import InputError


def curve_areas(fractions: Sequence[float], faithfulness: Sequence[float]) -> tuple[float, float]:
    """(CPR, CMD) of MIB (Mueller et al. 2025, arXiv 2504.13151): ∫ f and ∫ |1 − f| over the share
    kept, by the trapezoid rule on f_i and |1 − f_i|, on a linear axis.

    As in MIB's code, the areas run from the first to the last fraction and are not divided by that
    range (MIB: 0.001 to 1), and a segment on which f crosses 1 is counted as if it stayed on one
    side. Unlike there, fractions may be any, and are shares of heads where the caller's circuits
    are made of heads (MIB: of edges). f is the caller's: (circuit − all ablated) / (whole − all
    ablated) in the paper.

    Raises:
        InputError: fewer than two points, fractions not ascending within [0, 1], or numbers that
            are not finite.
    """
    x, f = np.asarray(fractions, dtype=np.float64), np.asarray(faithfulness, dtype=np.float64)
    if x.ndim != 1 or x.shape != f.shape or len(x) < 2:
        raise InputError(
            f"A curve has two or more points, not {x.size} fractions and {f.size} values."
        )
    if not (np.isfinite(x).all() and np.isfinite(f).all()):
        raise InputError(
            "Fractions and faithfulness must be finite; leave out what could not be measured."
        )
    if x[0] < 0 or x[-1] > 1 or (np.diff(x) <= 0).any():
        raise InputError("Fractions of heads kept ascend, each once, within 0 to 1.")
    width = np.diff(x)
    distance = np.abs(1 - f)
    cpr = float(np.sum(width * (f[1:] + f[:-1]) / 2))
    return cpr, float(np.sum(width * (distance[1:] + distance[:-1]) / 2))
