"""Image-centric heads."""

from __future__ import annotations

import torch

from interp.probes import ProbeBatch
from interp.scores.base import Score
from interp.scores.image_mass import NO_SINKS, image_masses, where_defined
from interp_hooks.observe import LayerStats, Question

IMAGE_MASS = 0.2
RHO = 0.8


class ImageCentric(Score):
    """Share of the words q after the image in which the head is image-centric: image mass ≥ 0.2 and r[q] ≥ ρ.

    ρ = 0.8, the paper's for general use (0.5 against hallucination, 0.9 for vision-centric tasks). Sinks, and layers
    without: as in `visual_sink`. Shape (batch, heads).
    """

    name = "image_centric"
    title = "Image-centric"
    reading = "For which share of the words the head looks at the image, and past its sinks."
    formula = "mean over words q after the image of 1[Σ_image A[q, ·] ≥ 0.2 and r[q] ≥ 0.8]"
    citation = "Kang et al. 2025 (ICLR), arXiv 2503.03321"
    probe = "image"
    default = True
    needs_images = True
    undefined = NO_SINKS

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"group_mass"}), n_groups=3)

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        sinks, others, rows = image_masses(layer, batch)
        mass = sinks + others
        centric = rows & (mass >= IMAGE_MASS) & (others >= RHO * mass)
        return where_defined(centric.sum(-1) / rows.sum(-1), layer, batch)
