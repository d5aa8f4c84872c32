"""How local a head is."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_kernels import Received

WINDOW = 10


class Local(Score):
    """mean_q Σ_{q−10 < k ≤ q} A[q, k]: share of attention within the last ten tokens, the current
    one included.

    Misleads:
        Ten tokens are ten tokens of the tokenizer: with bytes or characters they are two words. The
        token itself is among them, so a head that looks at itself is local.
    """

    name = "local"
    title = "Local attention"
    reading = (
        "Share of attention on the last ten tokens; near 1 the head only looks at its "
        "neighbourhood."
    )
    formula = "mean_q Σ_{q−10<k≤q} A[q, k]"
    citation = "Li et al. 2025, Attention Illuminates LLM Reasoning (local heads, W = 10)"
    probe = "text"
    default = True

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(received={"near": Received(band=(0, WINDOW - 1))})

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        # column means × counts = the sum over all (query, key) pairs of the band
        total = (layer.received["near"] * layer.received_count["near"]).sum(-1)
        return total / layer.queries.sum(-1, keepdim=True)
