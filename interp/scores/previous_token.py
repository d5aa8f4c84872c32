"""Previous-token heads."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class PreviousToken(Score):
    """mean over queries q ≥ 1 of A[q, q−1], on repeated random tokens (where bigrams say
    nothing).

    Misleads:
        It is measured on random tokens. A head that looks one token back only inside words, or only
        after some words, does not show.
    """

    name = "previous_token"
    title = "Previous token"
    reading = "Mean attention to the token just before; near 1 the head copies its left neighbour."
    formula = "mean_{q≥1} A[q, q−1]"
    citation = "Olsson et al. 2022, arXiv 2209.11895; threshold as in ARENA"
    threshold = 0.4
    role = "previous-token head"
    probe = "repeat"
    default = True

    def ask(self, batch: ProbeBatch) -> Question:
        slots = torch.arange(batch.input_ids.shape[1])[None, :, None] - 1  # −1 at query 0: none
        return Question(pairs={"previous": slots.expand(len(batch.input_ids), -1, -1)})

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        return layer.pair_mass["previous"][:, :, 1:].mean(-1)
