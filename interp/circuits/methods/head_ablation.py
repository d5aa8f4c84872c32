"""Head ablation: replace each head in turn and see what the metric loses. The reference that others
are judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.paired_runs import ABLATIONS, PairedRuns


@dataclass(frozen=True)
class HeadAblation(Method):
    """effect(h) = m(x) − m(x; z_h replaced), on the clean prompts; score = |mean effect|.

    One forward over the prompts a head. `mode`: what takes z's place, at every position: its mean
    over the corrupted prompts' tokens ("mean"), its value in the corrupted twin at the same
    position ("resample", a counterfactual), 0 ("zero"), or the constant with which the model's
    answers change least ("optimal", Li and Janson 2024, fitted on one half of the prompts and used
    on the other; 80 forwards and backwards more a head). The effect's interval is bootstrapped over
    prompts.

    Misleads:
        Heads go one at a time, so heads that stand in for each other hide one another. `mode` moves
        the result more than the method does.
    """

    mode: str = "mean"

    name = "head_ablation"
    title = "Head ablation"
    summary = "replace each head in turn: exhaustive, one pass a head"
    reading = "How much the metric changes when this head alone is replaced."
    formula = "|mean over prompts of m(x) − m(x; z_h := stand-in)|"
    citation = (
        "Michel et al. 2019, arXiv 1905.10650; Wang et al. 2022, arXiv 2211.00593, section 2.1"
    )
    unit = "metric"
    presets = {mode: {"mode": mode} for mode in ABLATIONS}

    def check(self) -> None:
        self.choice("mode", *ABLATIONS)

    def find(self, runs: PairedRuns) -> Found:
        runs.expect(len(runs.heads))
        clean = runs.margins()
        ablated = runs.ablated([[head] for head in runs.heads], self.mode, self.title)
        return by_effects(np.stack([clean - margins for margins in ablated]))


def by_effects(effects: np.ndarray, **more: Any) -> Found:
    """What effects (heads, n) on each prompt say: score |mean|, effect the mean."""
    mean = effects.mean(1)
    return Found(np.abs(mean), mean, effects=effects, **more)
