"""How far a head's output gate stands open."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class GateOpen(Score):
    """mean_q mean_d σ(x_q W_θ)[d] of a head's output gate, over the real tokens of a text.

    Each head's softmax·v is multiplied by the gate before W_O reads it. Architectures whose gate is
    a softplus (Laguna) go above 1.

    Misleads:
        An open gate says that output may pass, not that there is any: a head that rests on a sink
        of small value writes little through it. Where the gate is a softplus the value is no share.
    """

    name = "gate_open"
    title = "Output gate"
    reading = "How much of its output a head lets through: near 0 the head is shut on this text."
    formula = "mean_q mean_d σ(x_q W_θ)[d]"
    citation = "Qiu et al. 2025 (gated attention), arXiv 2505.06708"
    probe = "text"
    default = True
    needs_site = "output_gate"
    undefined = "this model's heads have no output gate, or one that can't be told from a norm"

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"gate"}))

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        if not layer.site.output_gate:
            return torch.full((len(layer.queries), layer.site.n_heads), torch.nan)
        gate = layer.gate  # (batch, heads, queries)
        # a head whose output is 0 hides its gate
        rows = layer.queries[:, None] & ~gate.isnan()
        return torch.where(rows, gate, 0).sum(-1) / rows.sum(-1)
