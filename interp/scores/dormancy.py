"""Active-dormant heads: idle on one kind of text, at work on another."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp.scores.sink import Sink, first_slot
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class Dormancy(Score):
    """α₁(prose) − α₁(code): difference of first-token attention between two text domains, in [−1,
    1].

    Misleads:
        It is a difference: a head that sleeps on both texts has 0, as one that is awake on both.
        Prose and code differ in more than their domain; code repeats itself.
    """

    name = "dormancy"
    title = "Active or dormant"
    reading = (
        "Positive: the head sleeps (parks on the first token) on prose and wakes on code; "
        "negative: the reverse."
    )
    formula = "α₁(prose) − α₁(code)"
    citation = "Guo et al. 2024, arXiv 2410.13835"
    low = -1.0
    high = 1.0
    probe = "domains"

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(pairs={"first": first_slot(batch)})

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        alpha = Sink().measure(layer, batch)  # (2, heads): prose, code
        return (alpha[0] - alpha[1])[None]
