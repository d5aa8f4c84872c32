"""Windowed average attention distance."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class WAAD(Score):
    """WAAD = mean_q Σ_k A[q, k]·min(q−k, W), W = 10, of each head.

    The paper averages the 30 % most local heads into one curve over tokens; `interp.rhythm` gives
    that curve.

    Misleads:
        Everything beyond ten tokens counts as ten: a head that looks a phrase back and one that
        rests on the first token are alike.
    """

    name = "waad"
    title = "Windowed attention distance"
    reading = (
        "Mean distance looked back, capped at ten tokens; low for heads that stay inside the "
        "current phrase."
    )
    formula = "mean_q Σ_k A[q, k]·min(q−k, 10)"
    citation = "Li et al. 2025, Attention Illuminates LLM Reasoning"
    unit = "tokens"
    high = 10.0
    probe = "text"

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"capped_distance"}), cap=10)

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        return layer.mean("capped_distance")
