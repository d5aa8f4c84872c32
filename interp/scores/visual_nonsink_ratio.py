"""How much of the attention on the image is on what it shows."""

from __future__ import annotations

import torch

from interp.probes import ProbeBatch
from interp.scores.base import Score
from interp.scores.image_mass import NO_SINKS, image_masses, where_defined
from interp_hooks.observe import LayerStats, Question


class VisualNonsinkRatio(Score):
    """r[q] = Σ_{k∈image∖sinks} A[q, k] / Σ_{k∈image} A[q, k], mean over the words q after the image.

    A mean of ratios, as VAR takes r row by row; `visual_sink` is a ratio of sums. Sinks, and layers without: as there.
    Shape (batch, heads).
    """

    name = "visual_nonsink_ratio"
    title = "Visual non-sink ratio"
    reading = "Which share of its attention on the image a head gives to tokens that are no sinks, word by word."
    formula = "mean over words q after the image of Σ_{k∈image∖sinks} A[q, k] / Σ_{k∈image} A[q, k]"
    citation = "Kang et al. 2025 (ICLR), arXiv 2503.03321"
    probe = "image"
    default = True
    needs_images = True
    undefined = NO_SINKS

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"group_mass"}), n_groups=3)

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        sinks, others, rows = image_masses(layer, batch)
        ratio = torch.where(rows, others / (sinks + others), torch.nan).nanmean(-1)
        return where_defined(ratio, layer, batch)
