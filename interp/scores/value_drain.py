"""Value-state drain of the first token."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class ValueDrain(Score):
    """1 − ‖v_first‖ / mean_{k>1} ‖v_k‖, per key/value head, given to each of its query heads.

    Misleads:
        It is the length of the value, not of what W_O makes of it. And it is a key/value head's:
        query heads that share it have one number, though only some of them may rest there.
    """

    name = "value_drain"
    title = "Value-state drain"
    reading = (
        "Near 1 the first token's value is nearly zero: attending to it adds nothing, a mark "
        "of a true sink."
    )
    formula = "1 − ‖v₁‖ / mean_{k>1} ‖v_k‖"
    citation = "Guo et al. 2024, arXiv 2410.13835"
    low = None
    grain = "kv_head"
    probe = "text"

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"value_norm"}))

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        norm = layer.value_norm  # (batch, kv_heads, keys)
        order = layer.keys.long().cumsum(-1)[:, None]
        first = torch.where((order == 1) & layer.keys[:, None], norm, 0.0).sum(-1)
        rest = ((order > 1) & layer.keys[:, None]).float()
        mean = (norm * rest).sum(-1) / rest.sum(-1)
        drain = 1 - first / mean.clamp_min(1e-9)
        return drain.repeat_interleave(layer.site.n_heads // layer.site.n_kv_heads, 1)
