"""Heads by the size of their first-order effect, prompt by prompt: what a method with an
autoencoder must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.circuits.methods.attribution import first_order
from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.paired_runs import MODES, PairedRuns


@dataclass(frozen=True)
class MeanAbsEffect(Method):
    """score(h) = mean over prompts of |Σ (z_h − stand-in) · ∂m/∂z_h|: one forward and one backward,
    nothing trained. `mode` as in `attribution`.

    Misleads:
        A head whose effect is noise about 0 has a large mean size.
    """

    mode: str = "mean"

    name = "mean_abs_effect"
    title = "Mean |effect|"
    summary = "the size of the first-order effect, prompt by prompt"
    reading = "How much the metric would change, to first order, in the mean prompt."
    formula = "mean over prompts of |Σ (z_h − stand-in) · ∂m/∂z_h|"
    citation = "control; Michel et al. 2019, arXiv 1905.10650"
    unit = "metric"

    def check(self) -> None:
        self.choice("mode", *MODES)

    def find(self, runs: PairedRuns) -> Found:
        effects = first_order(runs, self.mode, self.title)  # (heads, n)
        return Found(np.abs(effects).mean(1), effects.mean(1), effects=effects)
