"""Attribution patching of heads: the effect of replacing a head, to first order, from one backward
pass."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.methods.head_ablation import by_effects
from interp.circuits.runs.paired_runs import MODES, PairedRuns
from interp.streams.backward import Rules, ruled


@dataclass(frozen=True)
class Attribution(Method):
    """effect(h) = Σ over positions and d of (z_h(x) − stand-in) · ∂m/∂z_h, at the clean run; score
    = |mean effect|.

    `head_ablation`'s effect to first order, of all heads from two forwards and one backward.
    `mode`: what z is compared with: its value in the corrupted twin at the same position
    ("resample"), its mean over the corrupted prompts' tokens ("mean"), or 0 ("zero", gradient ×
    activation). The effect's interval is bootstrapped over prompts.

    Misleads:
        It is of first order: a saturated head has a small gradient. `mode` decides: against a truth
        by mean ablation mode "mean" leads, against one by resampling "resample".
    """

    mode: str = "resample"

    name = "attribution"
    title = "Attribution patching"
    summary = "gradient × change of z: head ablation to first order, one backward pass"
    reading = "How much the metric would change, to first order, if this head were replaced."
    formula = "|mean over prompts of Σ (z_h − stand-in) · ∂m/∂z_h|"
    citation = "Nanda 2023, Attribution patching; Kramár et al. 2024, arXiv 2403.00745, section 3"
    unit = "metric"
    presets = {"zero": {"mode": "zero"}, "mean": {"mode": "mean"}, "resample": {"mode": "resample"}}

    def check(self) -> None:
        self.choice("mode", *MODES)

    def find(self, runs: PairedRuns) -> Found:
        return by_effects(first_order(runs, self.mode, self.title))


def first_order(runs: PairedRuns, mode: str, what: str, rules: Rules | None = None) -> np.ndarray:
    """(heads, n) float64: Σ over positions and d of (z − stand-in) · ∂m/∂z at the clean run, on
    each prompt; the derivative is that of `rules`, if given."""
    batches = runs.batches(gradients=True)
    runs.expect(len(batches))
    scores = []
    for pairs in batches:
        stand_ins = runs.stand_ins(pairs, mode)
        with nullcontext() if rules is None else ruled(runs.model, rules):
            _, activations, gradients = runs.gradients(pairs, keep=("z",))
        layers = []
        for layer in runs.layers:
            z, slope, stand = (
                activations["z", layer],
                gradients["z", layer],
                stand_ins[layer],
            )  # (batch, tokens, heads, d)
            change = z - (stand if isinstance(stand, float) else stand.to(z))
            layers.append((change.double() * slope.double()).sum((1, 3)))  # (batch, heads)
        scores.append(torch.cat(layers, 1).T.cpu().numpy())
        runs.step(what)
    return np.concatenate(scores, axis=1)
