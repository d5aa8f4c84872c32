"""Retrieval heads under teacher forcing: who would copy the needle if the answer were said."""

from __future__ import annotations

import torch

from interp.probes.answer import answer_of
from interp.probes.probe import ProbeBatch
from interp.scores.retrieval import tokens_copied
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class RetrievalForced(Score):
    """|g_h ∩ k| / |k| as `retrieval`, with the right answer given instead of generated: at step t
    the head copies its token w iff argmax_j A[t, j] of the row t that predicts w lies in the needle
    and x_j = w.

    One forward over prompt and answer; every problem counts, solved or not, so that there is a
    value where greedy decoding strays from the answer.

    Misleads:
        Problems that the model would get wrong count as much as those it solves: the head looks at
        the needle, and the model may say something else.
    """

    name = "retrieval_forced"
    title = "Retrieval, answer given"
    reading = (
        "Share of the needle that the head looks at where it has to be said next, the answer "
        "being given; from 0.1 a head counts."
    )
    formula = "|g_h ∩ k| / |k|, g_h from the rows that predict the given answer"
    citation = "after Wu et al. 2024, arXiv 2404.15574, with teacher forcing"
    threshold = 0.1
    role = "retrieval head, where the answer is given"
    probe = "answer"

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"argmax"}))

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        instance = batch.info["instance"]
        rows = list(instance.positions)
        strongest = layer.argmax[0][:, rows].T.cpu()  # (steps, heads) absolute slots
        got = tokens_copied(instance, strongest, answer_of(instance))
        return got.float().mean(-1)[None]
