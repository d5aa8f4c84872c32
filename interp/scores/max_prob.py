"""How decided a head is."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class MaxProb(Score):
    """mean_q max_k A[q, k], averaged over the real tokens of a text.

    Misleads:
        The largest weight is often the first token's: the four most decided heads of SmolLM2 are
        its four strongest sinks.
    """

    name = "max_prob"
    title = "Largest weight"
    reading = "How decided the head is: the mean of its largest attention weight."
    formula = "mean_q max_k A[q, k]"
    citation = "Voita et al. 2019, arXiv 1905.09418 (head confidence)"
    unit = ""
    high = 1.0
    probe = "text"
    default = True

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"max"}))

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        return layer.mean("max")
