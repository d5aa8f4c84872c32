"""How spread out a head attends."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class Entropy(Score):
    """mean_q −Σ_k A[q, k] ln A[q, k], averaged over the real tokens of a text.

    Misleads:
        It grows with the number of keys, so scans of different lengths do not compare. A head that
        rests on the first token has little entropy and looks focused; where a sink is learned, see
        `key_entropy`.
    """

    name = "entropy"
    title = "Entropy"
    reading = "How spread out the head attends: 0 is a single token, ln(T) is uniform attention."
    formula = "mean_q −Σ_k A[q, k] ln A[q, k]"
    citation = "Zhai et al. 2023, arXiv 2303.06296"
    unit = "nats"
    high = None
    probe = "text"
    default = True

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"entropy"}))

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        return layer.mean("entropy")
