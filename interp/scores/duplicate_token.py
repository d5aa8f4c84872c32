"""Duplicate-token heads."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class DuplicateToken(Score):
    """mean over the second copy of A[q, q−n]: attention to the earlier occurrence of the same
    token.

    Misleads:
        It is measured at one distance, where the sequence starts again. A head that finds only near
        repeats, or only repeated names, does not show.
    """

    name = "duplicate_token"
    title = "Duplicate token"
    reading = "Mean attention from a repeated token to its first occurrence."
    formula = "mean_{q in 2nd copy} A[q, q−n]"
    citation = "Wang et al. 2022, arXiv 2211.00593"
    threshold = 0.4
    role = "duplicate-token head"
    probe = "repeat"
    default = True

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(pairs={"duplicate": repeat_slots(batch, 0)})

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        second = batch.info["start"] + batch.info["repeat"]
        return layer.pair_mass["duplicate"][:, :, second:].mean(-1)


def repeat_slots(batch: ProbeBatch, shift: int) -> torch.Tensor:
    """(batch, queries, 1): for queries of the second copy the slot q − n + shift, else −1."""
    start, n = batch.info["start"], batch.info["repeat"]
    slots = torch.arange(batch.input_ids.shape[1])
    target = torch.where(slots >= start + n, slots - n + shift, -1)
    return target[None, :, None].expand(len(batch.input_ids), -1, -1)
