"""Gradient interaction modifications: attribution patching with a backward pass that sees past
saturated attention."""

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
from interp.streams.backward import Rules

#: on the gradients to queries and keys, and to values: each is one of three factors of attention,
#: softmax(q·k)·v, the first two inside another product
LOGITS, VALUES = 0.25, 0.5


@dataclass(frozen=True)
class GIM(Method):
    """effect(h) = Σ over positions and d of (z_h(x) − stand-in) · γ(z_h), at the clean run, where γ
    is ∂m/∂z_h of a backward pass with these rules; score = |mean effect|.

    Norms: their scales 1/σ are constants. Softmax: its Jacobian is diag(p) − p pᵀ with p =
    softmax(logits / T), T = `temperature`, as in the released code without a factor 1/T. Queries
    and keys get a quarter of their gradient, values half. With `gates` (the released code since,
    not the paper's text) both factors of an MLP's gate get half as well. The forward is the
    model's own, bit by bit.

    Where attention is saturated (p near 1), the softmax's own gradient is near 0 though moving the
    logits far would matter; at T = 2 it is not. `mode` and `edges` are those of `relp`.

    Raises `TapError` where the rules don't reach all of the model (`relp` tells how that is seen).

    Misleads:
        It is no derivative of anything, so effects are in the metric's units only by name: ranks
        may be compared, sizes not. The factors ¼ and ½ weigh heads that act through many layers of
        attention less at each.
    """

    mode: str = "resample"
    temperature: float = 2.0
    gates: bool = False
    edges: bool = False

    name = "gim"
    title = "Gradient interaction modifications"
    summary = "gradient × change of z: norms held, softmax's gradient at temperature 2"
    reading = (
        "How much the metric would change if this head were replaced, by a backward pass with "
        "softer attention."
    )
    effect_reading = (
        "The sign by this backward pass: above 0 the head works for the right answer, below 0 "
        "against it; its size compares with other heads' alone."
    )
    formula = (
        "|mean over prompts of Σ (z_h − stand-in) · γ(z_h)|, softmax's gradient at T, q and k "
        "÷ 4, v ÷ 2"
    )
    citation = "Edin et al. 2025, arXiv 2505.17630"
    unit = "metric"
    presets = {
        "paper": {"gates": False},
        "code": {"gates": True},
        "zero": {"mode": "zero"},
        "edges": {"edges": True},
    }

    def check(self) -> None:
        self.choice("mode", *MODES)
        for name in ("gates", "edges"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(
                    f"{name} of {self.name} is true or false, not {getattr(self, name)!r}."
                )
        if not (isinstance(self.temperature, int | float) and 0 < self.temperature < np.inf):
            raise InputError(
                f"temperature of {self.name} is a number above 0, not {self.temperature!r}."
            )

    @property
    def rules(self) -> Rules:
        """What the backward pass does otherwise."""
        return Rules(
            products=self.gates,
            logits=LOGITS,
            values=VALUES,
            temperature=float(self.temperature),
        )

    def find(self, runs: PairedRuns) -> Found:
        check_rules(runs)
        stream = Stream(runs) if self.edges else None
        effects = first_order(runs, self.mode, self.title, self.rules)
        if stream is None:
            return by_effects(effects)
        scores: np.ndarray = edge_scores(runs, stream, self.title, self.rules) / len(runs.prompts)
        return by_effects(effects, edges=stream.graph.table(scores))
