"""Retrieval heads: which heads copy the needle while the model answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import DecodeScore
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


def copied(steps: Sequence[LayerStats], batch: ProbeBatch) -> torch.Tensor:
    """(heads, needle tokens) bool: needle tokens that each head copied in this decode."""
    strongest = [stats.argmax[0, :, -1].cpu() for stats in steps]
    return tokens_copied(batch.info["instance"], strongest, batch.info["generated"])


def tokens_copied(
    instance: Any, strongest: Iterable[torch.Tensor], tokens: Sequence[int]
) -> torch.Tensor:
    """(heads, needle tokens) bool: which of the needle's distinct tokens each head copied.

    At a step that says w, a head copies w iff w is in the needle and the head's strongest key j
    lies in the needle with x_j = w (Wu et al., definition of g_h). `strongest`: (heads,) absolute
    slots a step; `tokens`: what is said at each.
    """
    start, stop = instance.info["needle"]
    needle = sorted(set(instance.ids[start:stop]))
    steps = list(strongest)
    got = torch.zeros(len(steps[0]), len(needle), dtype=torch.bool)
    for slots, token in zip(steps, tokens, strict=True):
        if token not in needle:
            continue
        same = torch.tensor(
            [start <= j < stop and instance.ids[j] == token for j in slots.tolist()]
        )
        got[same, needle.index(token)] = True
    return got


class Retrieval(DecodeScore):
    """|g_h ∩ k| / |k|: share of the needle's distinct tokens that the head copied while the model
    answered.

    Averaged over solved instances only (greedy decode equal to the needle); g_h and k are sets, so
    the score is at most 1. A head with a mean of 0.1 or more is a retrieval head.

    Misleads:
        The prompt decides whether there is a score at all: of eight needles at 256 tokens SmolLM2
        solves none after "Answer:" and seven where the answer's sentence is begun. Only literal
        copies count: a head that finds the answer elsewhere than at its copy has 0.
    """

    name = "retrieval"
    title = "Retrieval"
    reading = (
        "Share of the needle that the head looked at while the model copied it; 0.1 makes a "
        "retrieval head."
    )
    formula = "|g_h ∩ k| / |k|, averaged over solved needle problems"
    citation = "Wu et al. 2024, arXiv 2404.15574"
    threshold = 0.1
    role = "retrieval head"
    probe = "needle"
    default = True

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"argmax"}))

    def measure_steps(self, steps: Sequence[LayerStats], batch: ProbeBatch) -> torch.Tensor:
        if not batch.info["solved"]:
            return torch.full((1, steps[0].argmax.shape[1]), torch.nan)
        return copied(steps, batch).float().mean(-1)[None]
