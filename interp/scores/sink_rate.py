"""The published sink metric at its published setting."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp.scores.sink import first_slot
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats

LENGTH, EPSILON = 64, 0.3


class SinkRate(Score):
    """Share of samples in which α₁ at T = 64 exceeds ε = 0.3; its mean over heads × 100 is Sink₁^ε.

    α_k = (1/(T−k+1)) Σ_{q≥k} A[q, k]. Attention is causal, so the first 64 rows of a longer text
    are exactly the pass at T = 64, whatever the context of the scan.

    Misleads:
        The test is of 64 tokens: 207 of SmolLM2's 270 heads pass it in half of the texts, while 128
        have `sink` ≥ 0.3 at 1,024 tokens. It is no rate at the length of the scan.
    """

    name = "sink_rate"
    title = "Sink rate (T = 64)"
    reading = (
        "In which share of texts the head is a sink head by the published test, α₁ > 0.3 "
        "over 64 tokens."
    )
    formula = "mean over samples of 1[α₁ > 0.3] at T = 64"
    citation = "Gu et al. 2025 (ICLR), arXiv 2410.10781, section 3"
    threshold = 0.5
    length = LENGTH
    least_samples = 8
    probe = "text"
    default = True

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(pairs={"first": first_slot(batch)})

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        real = layer.queries & (layer.queries.long().cumsum(-1) <= LENGTH)
        rows = real[:, None].float()
        alpha = (layer.pair_mass["first"] * rows).sum(-1) / rows.sum(-1)
        return (alpha > EPSILON).float()
