"""Attention on the image beyond an even head's."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.image_mass import image_masses
from interp.scores.score import Score
from interp_hooks.call import AttentionCall
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_kernels.patterns import visible


class ImageExcess(Score):
    """(m − s) / (1 − s), mean over the words q after the image: m = Σ_{k∈image} A[q, k], and s is
    the share of the keys that q sees which are the image's, what a head has there that gives all
    keys the same. Shape (batch, heads).

    0 in such an even head, 1 in one that looks at nothing else, below 0 in one that looks away, −s
    / (1 − s) at least. In a prompt of image tokens nearly alone, m by itself is large in any head.

    Misleads:
        Little is left above an even head where nearly all tokens are the image's: s = 0.9 asks for
        m ≥ 0.92. A head that rests on the first token when it has nothing to say is below 0,
        however well it looks at other times; `gaze` tells whether what it gives lies on the right
        thing.
    """

    name = "image_excess"
    title = "Image excess"
    reading = (
        "How much more of its attention a head gives to the image than one that looks at all "
        "tokens alike: 0 is that head, 1 looks at the image alone."
    )
    formula = "mean over words q after the image of (Σ_{k∈image} A[q, k] − s[q]) / (1 − s[q])"
    citation = (
        "this project, with the 0.2 of Kang et al. 2025 (arXiv 2503.03321) above an even head's "
        "share in place of above 0"
    )
    low = None
    threshold = 0.2
    role = "looks at the image"
    probe = "image"
    default = True
    needs_images = True
    drawn = 2

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"group_mass"}), n_groups=2, call=True)

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        """NaN where a prompt's words see the image alone."""
        sinks, others, rows = image_masses(layer, batch)
        assert layer.call is not None
        s = even_share(layer.call, batch).to(others.device)  # (batch, heads or 1, queries)
        room = 1 - s
        rows = rows & (room > 0)
        excess = (sinks + others - s) / torch.where(rows, room, 1.0)
        return torch.where(rows, excess, 0.0).sum(-1) / rows.sum(-1)


def even_share(call: AttentionCall, batch: ProbeBatch) -> torch.Tensor:
    """(batch, heads or 1, queries): of the keys that each query sees, the share that is the
    image's; 0 where it sees none."""
    image = batch.info["image"].to(call.value.device)
    seen = visible(call.mask, len(image), call.n_queries, call.n_keys, call.value.device)
    on_image = (seen & image[:, None, None, : call.n_keys]).sum(-1)
    return on_image / seen.sum(-1).clamp_min(1)
