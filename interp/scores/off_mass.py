"""Attention that rests on a head's learned sink."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats

#: why models without sink logits have no such score
NO_SINK_LOGITS = "the softmax of this model's heads has no logit of its own (a learned sink)"


class OffMass(Score):
    """mean_q 1 − Σ_k A[q, k], the share of the head's sink logit, over the real tokens of a text.

    The first token needs no mass where there is a learned sink: `sink` of such a head may be 0, its
    entropy small, and the head idle all the same.

    Misleads:
        It is of this text: a head that is off on prose may work on code. A head without mass here
        may still rest on the first token, which `sink` tells.
    """

    name = "off_mass"
    title = "Mass on the learned sink"
    reading = "How much attention rests on no token at all: near 1 the head is off on this text."
    formula = "mean_q 1 − Σ_k A[q, k] = mean_q exp(s_h − lse_q)"
    citation = "OpenAI 2025 (gpt-oss), arXiv 2508.10925"
    probe = "text"
    default = True
    needs_site = "learned_sinks"
    undefined = NO_SINK_LOGITS

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"key_mass"}))

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        mean = layer.mean("key_mass")  # (batch, heads)
        return 1 - mean if layer.site.learned_sinks else torch.full_like(mean, torch.nan)
