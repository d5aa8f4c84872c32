"""Head ablation: replace each head in turn and see what the metric loses. The reference that others
are judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.paired_runs import MODES, PairedRuns
from interp.support.statistics import RESAMPLES


@dataclass(frozen=True)
class HeadAblation(Method):
    """effect(h) = m(x) − m(x; z_h replaced), on the clean prompts; score = |mean effect|.

    One forward over the prompts a head. `mode`: what takes z's place, at every position: its mean
    over the corrupted prompts' tokens ("mean"), its value in the corrupted twin at the same
    position ("resample", a counterfactual), or 0 ("zero"). Intervals are bootstrapped over prompts.

    Misleads:
        Heads go one at a time, so heads that stand in for each other hide one another. `low` and
        `high` are of the size of the effect and never contain 0: they are no test
        (`interp.circuits.measured` is). `mode` moves the result more than the method does.
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
    presets = {"zero": {"mode": "zero"}, "mean": {"mode": "mean"}, "resample": {"mode": "resample"}}

    def check(self) -> None:
        self.choice("mode", *MODES)

    def find(self, runs: PairedRuns) -> Found:
        runs.expect(len(runs.heads))
        clean = runs.margins()
        ablated = runs.ablated([[head] for head in runs.heads], self.mode, self.title)
        return by_effects(np.stack([clean - margins for margins in ablated]), runs.seed)


def by_effects(effects: np.ndarray, seed: int, **more: Any) -> Found:
    """What effects (heads, n) on each prompt say: score |mean|, its standard error and its 95 %
    bootstrap interval."""
    mean = effects.mean(1)
    low, high = np.quantile(np.abs(resampled_means(effects, seed)), [0.025, 0.975], axis=1)
    stderr = effects.std(1, ddof=1) / np.sqrt(effects.shape[1]) if effects.shape[1] > 1 else None
    return Found(np.abs(mean), mean, stderr, low, high, effects, **more)


def resampled_means(effects: np.ndarray, seed: int) -> np.ndarray:
    """(heads, resamples): means of `effects` (heads, n) over bootstrap samples of the prompts, the
    same for all."""
    n = effects.shape[1]
    rng = np.random.default_rng(seed)
    # how often each prompt is drawn, rather than the draws: (resamples, n)
    counts = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return effects @ counts.T / n
