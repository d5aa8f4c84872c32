"""How often a retrieval head is active."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.retrieval import copied
from interp.scores.score import DecodeScore
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class RetrievalActivation(DecodeScore):
    """Share of solved needle problems in which the head copied at least one needle token.

    Misleads:
        One copied token is enough, so the strongest heads tie: four of SmolLM2's have 1.00. It does
        not order them.
    """

    name = "retrieval_activation"
    title = "Retrieval activation"
    reading = (
        "In which share of solved needle problems the head copies at all; 1 means it is "
        "always at work."
    )
    formula = "mean over solved problems of 1[|g_h| ≥ 1]"
    citation = "Wu et al. 2024, arXiv 2404.15574, section 3"
    probe = "needle"
    default = True

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"argmax"}))

    def measure_steps(self, steps: Sequence[LayerStats], batch: ProbeBatch) -> torch.Tensor:
        if not batch.info["solved"]:
            return torch.full((1, steps[0].argmax.shape[1]), torch.nan)
        return copied(steps, batch).any(-1).float()[None]
