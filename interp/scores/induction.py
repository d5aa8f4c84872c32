"""Induction heads."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.duplicate_token import repeat_slots
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class Induction(Score):
    """mean over the second copy of A[q, q−n+1]: attention to the token after the earlier
    occurrence.

    Misleads:
        It says that a head looks at what followed, not that it writes it: see `ov_copying`, and
        take the head out. It fades with distance: of SmolLM2's heads five have 0.4 in 512 tokens,
        and none in 8,192.
    """

    name = "induction"
    title = "Induction"
    reading = (
        "Mean attention to what followed this token last time; such heads continue patterns "
        "in context."
    )
    formula = "mean_{q in 2nd copy} A[q, q−n+1]"
    citation = "Olsson et al. 2022, arXiv 2209.11895; threshold as in ARENA"
    threshold = 0.4
    role = "induction head"
    probe = "repeat"
    default = True

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(pairs={"induction": repeat_slots(batch, 1)})

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        second = batch.info["start"] + batch.info["repeat"]
        return layer.pair_mass["induction"][:, :, second:].mean(-1)
