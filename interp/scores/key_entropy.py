"""How spread out a head attends among tokens, its learned sink left aside."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.off_mass import NO_SINK_LOGITS
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class KeyEntropy(Score):
    """mean_q −Σ_k B[q, k] ln B[q, k] with B = A / Σ_k A, over the real tokens of a text.

    A learned sink leaves Σ_k A < 1, and −Σ A ln A then mixes two things: a head that is nearly off
    looks focused. With m = Σ_k A this is (−Σ A ln A)/m + ln m.

    Misleads:
        It says how the rest is spread, however little that is: a head that leaves 1 % of its
        attention to tokens has a value like any other. Read `off_mass` beside it.
    """

    name = "key_entropy"
    title = "Entropy among tokens"
    reading = (
        "How spread out the attention is that a learned sink leaves to tokens; entropy counts "
        "the missing share as focus."
    )
    formula = "mean_q −Σ_k B[q, k] ln B[q, k], B = A / Σ_k A"
    citation = "OpenAI 2025 (gpt-oss), arXiv 2508.10925; Zhai et al. 2023, arXiv 2303.06296"
    unit = "nats"
    high = None
    probe = "text"
    default = True
    needs_site = "learned_sinks"
    undefined = NO_SINK_LOGITS

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"entropy", "key_mass"}))

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        mass, entropy = layer.key_mass.double(), layer.entropy.double()  # (batch, heads, queries)
        if not layer.site.learned_sinks:
            return torch.full_like(mass[..., 0], torch.nan)
        # a row whose mass underflowed says nothing of where the rest would be
        rows = layer.queries[:, None] & (mass > 1e-30)
        safe = torch.where(rows, mass, 1)
        own = torch.where(rows, entropy / safe + safe.log(), 0)
        return own.sum(-1) / rows.sum(-1)
