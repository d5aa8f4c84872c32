"""How far back a head looks."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class Distance(Score):
    """mean_q Σ_k A[q, k]·(q−k), averaged over the real tokens of a text.

    Misleads:
        Nothing is farther than the first token, so sinks look like global heads: the four longest
        distances of SmolLM2 are its four strongest sinks.
    """

    name = "distance"
    title = "Attention distance"
    reading = (
        "How far back the head looks, in tokens; local heads have small values, global heads "
        "large ones."
    )
    formula = "mean_q Σ_k A[q, k]·(q−k)"
    citation = "Li et al. 2025, Attention Illuminates LLM Reasoning (span of a head)"
    unit = "tokens"
    high = None
    probe = "text"
    default = True

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"distance"}))

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        return layer.mean("distance")
