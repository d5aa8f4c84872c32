"""Attention on the first token."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class Sink(Score):
    """α₁ = (1/T) Σ_q A[q, first]: mean attention that the first real token receives, over the
    context.

    Pads are skipped: under left padding the first real token stands after them. Shape (batch,
    heads).

    Misleads:
        It says where a head looks on this text, not that it is idle: heads that copy rest on the
        first token while there is nothing to copy. Five of SmolLM2's eight strongest sinks are
        retrieval heads. It moves with the tokenizer's BOS and falls slowly with length.
    """

    name = "sink"
    title = "Attention sink"
    reading = (
        "How much of its attention a head parks on the first token; near 1 the head is "
        "mostly idle on this text."
    )
    formula = "α₁ = (1/T) Σ_q A[q, 1]"
    citation = "Xiao et al. 2024, arXiv 2309.17453; Gu et al. 2025, arXiv 2410.10781"
    threshold = 0.3
    role = "rests on the first token"
    probe = "text"
    default = True

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(pairs={"first": first_slot(batch)})

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        mass = layer.pair_mass["first"]  # (batch, heads, queries)
        rows = layer.queries[:, None].float()
        return (mass * rows).sum(-1) / rows.sum(-1)


def first_slot(batch: ProbeBatch) -> torch.Tensor:
    """(batch, 1, 1): the slot of the first real token of each row."""
    if batch.attention_mask is None:
        return torch.zeros(len(batch.input_ids), 1, 1, dtype=torch.long)
    return batch.attention_mask.long().argmax(-1)[:, None, None]
