"""Image-centric heads."""

from __future__ import annotations

import torch

from interp.scores.image_mass import SinkScore

IMAGE_MASS = 0.2
RHO = 0.8


class ImageCentric(SinkScore):
    """Share of the words q after the image in which the head is image-centric: image mass ≥ 0.2 and
    r[q] ≥ ρ.

    ρ = 0.8, the paper's for general use (0.5 against hallucination, 0.9 for vision-centric tasks).
    Sinks, and layers without: as in `visual_sink`. Shape (batch, heads).

    Misleads:
        Two thresholds decide word by word: a head just below one of them counts as if it saw
        nothing. ρ differs by task in the paper, 0.5 to 0.9.
    """

    name = "image_centric"
    title = "Image-centric"
    reading = "For which share of the words the head looks at the image, and past its sinks."
    formula = "mean over words q after the image of 1[Σ_image A[q, ·] ≥ 0.2 and r[q] ≥ 0.8]"

    def of(self, sinks: torch.Tensor, others: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        mass = sinks + others
        centric = rows & (mass >= IMAGE_MASS) & (others >= RHO * mass)
        return centric.sum(-1) / rows.sum(-1)
