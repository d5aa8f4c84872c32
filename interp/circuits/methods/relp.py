"""Relevance patching: attribution patching with the derivatives of layer-wise relevance
propagation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.circuits.methods.attribution import first_order
from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.methods.eap import edge_scores
from interp.circuits.methods.head_ablation import by_effects
from interp.circuits.runs.edges import Stream
from interp.circuits.runs.paired_runs import MODES, PairedRuns
from interp.circuits.runs.relevance import check_rules
from interp.errors import InputError
from interp.streams.backward import RELEVANCE, without_attention

ATTENTION = ("gradient", "frozen")


@dataclass(frozen=True)
class RelP(Method):
    """effect(h) = Σ over positions and d of (z_h(x) − stand-in) · ρ(z_h), at the clean run, where ρ
    is ∂m/∂z_h of a backward pass with these rules; score = |mean effect|.

    Norms: their scales 1/σ are constants. Activations: act(x) is x times the constant act(x)/x.
    Products of two activations (gates): each gets half. Attention: its weights have their own
    gradient ("gradient", the rules of the released code's example), or are constants ("frozen", the
    AH-rule, which that code lists beside them). The forward is the model's own, bit by bit.

    With frozen attention Σ x · ρ(x) over a layer's stream is the metric, less what biases add. That
    identity is held against the model's logits before anything is scored (one more forward and
    backward of a single pair), and a model in which some norm, activation or gate is of an unknown
    kind is refused.

    `mode`: what z is compared with, as in `attribution`. `edges`: a table of edges too, as `eap`'s
    but with these derivatives; head scores stay those of whole heads.

    Raises `TapError` where the rules don't reach all of the model.

    Misleads:
        It is no derivative, and an estimate of what replacing a head does only where the model is
        linear, its norms, activations and gates held. With frozen attention no relevance goes
        through queries and keys: a head that acts by where a later head looks has nothing. On
        SmolLM2-135M (IOI, 8 pairs) head effects correlate .95 with those of resampling each head,
        .71 when frozen, and attribution's .96; of the planted IOI circuit frozen attention ranks
        heads little better than chance (AUC .67; 1 with its gradient).
    """

    mode: str = "resample"
    attention: str = "gradient"
    edges: bool = False

    name = "relp"
    title = "Relevance patching"
    summary = "change of z × relevance: norms and gates as factors, one backward pass"
    reading = (
        "How much the metric would change if this head were replaced, with the scales of norms, "
        "activations and gates as constants."
    )
    effect_reading = (
        "What the metric would lose without the head by these rules: above 0 it works for the "
        "right answer, below 0 against it."
    )
    formula = "|mean over prompts of Σ (z_h − stand-in) · ρ(z_h)|, ρ by LN, identity and half rules"
    citation = "Jafari et al. 2025, arXiv 2508.21258; Ali et al. 2022, for the norms and attention"
    unit = "metric"
    presets = {
        "gradient": {"attention": "gradient"},
        "frozen": {"attention": "frozen"},
        "zero": {"mode": "zero"},
        "edges": {"edges": True},
    }

    def check(self) -> None:
        self.choice("mode", *MODES)
        self.choice("attention", *ATTENTION)
        if not isinstance(self.edges, bool):
            raise InputError(f"edges of {self.name} is true or false, not {self.edges!r}.")

    def find(self, runs: PairedRuns) -> Found:
        check_rules(runs)
        rules = RELEVANCE if self.attention == "frozen" else without_attention(RELEVANCE)
        stream = Stream(runs) if self.edges else None
        effects = first_order(runs, self.mode, self.title, rules)
        if stream is None:
            return by_effects(effects)
        scores: np.ndarray = edge_scores(runs, stream, self.title, rules) / len(runs.prompts)
        return by_effects(effects, edges=stream.graph.table(scores))
