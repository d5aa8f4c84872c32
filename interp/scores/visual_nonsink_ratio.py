"""How much of the attention on the image is on what it shows."""

from __future__ import annotations

import torch

from interp.scores.image_mass import SinkScore


class VisualNonsinkRatio(SinkScore):
    """r[q] = Σ_{k∈image∖sinks} A[q, k] / Σ_{k∈image} A[q, k], mean over the words q after the
    image.

    A mean of ratios, as VAR takes r row by row; `visual_sink` is a ratio of sums. Sinks, and layers
    without: as there. Shape (batch, heads).

    Misleads:
        It is a share of what the image gets: a head that gives the image next to nothing may have
        1. Read `image_mass` beside it.
    """

    name = "visual_nonsink_ratio"
    title = "Visual non-sink ratio"
    reading = (
        "Which share of its attention on the image a head gives to tokens that are no sinks, "
        "word by word."
    )
    formula = "mean over words q after the image of Σ_{k∈image∖sinks} A[q, k] / Σ_{k∈image} A[q, k]"

    def of(self, sinks: torch.Tensor, others: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ratio = torch.where(rows, others / (sinks + others), torch.nan).nanmean(-1)
        return ratio
