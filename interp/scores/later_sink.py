"""Sinks that are not the first token."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_kernels import Received

MIN_ROWS = 64


class LaterSink(Score):
    """max_{k>1} α_k, α_k = mean attention that key k receives from the queries that see it.

    Keys seen by fewer than 64 queries (a quarter of a short context) are left out: means over few
    rows are large by chance, uniform attention alone would flag the last keys.

    Misleads:
        It says that some key collects attention, not why: a name that a text comes back to is one
        as much as a full stop. It is a largest value, so more keys make it larger.
    """

    name = "later_sink"
    title = "Later sinks"
    reading = (
        "The strongest sink other than the first token: a full stop, say, that collects attention."
    )
    formula = "max_{k>1} (1/(T−k+1)) Σ_{q≥k} A[q, k]"
    citation = "Yu et al. 2024 (ACT), arXiv 2406.15765; Gu et al. 2025, arXiv 2410.10781"
    threshold = 0.1
    role = "rests on a later token"
    probe = "text"

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(received={"all": Received()})

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        mean, count = (
            layer.received["all"],
            layer.received_count["all"],
        )  # (batch, heads, keys), (batch, 1, keys)
        order = layer.keys.long().cumsum(-1)[:, None]  # 1 for the first real key
        enough = (count >= min(MIN_ROWS, mean.shape[-1] // 4)) & (order > 1) & layer.keys[:, None]
        return torch.where(enough, mean, 0.0).amax(-1)
