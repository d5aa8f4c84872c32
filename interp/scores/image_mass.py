"""Attention on the image."""

from __future__ import annotations

from abc import abstractmethod

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class ImageMass(Score):
    """Σ_{k∈image} A[q, k], mean over the words q after the image. Shape (batch, heads).

    Misleads:
        Part of it may lie on a few patches that collect attention whatever they show: `visual_sink`
        says how much. More image tokens make more of it: where 36 of a prompt's 41 tokens are the
        image's, a head that looks at all alike gives it 0.9. `image_excess` is what it gives beyond
        such a head, and names the heads that look at the image.
    """

    name = "image_mass"
    title = "Image mass"
    reading = (
        "How much of its attention a head gives to the image while the model reads or writes "
        "about it."
    )
    formula = "mean over words q after the image of Σ_{k∈image} A[q, k]"
    citation = (
        "Kang et al. 2025 (ICLR), arXiv 2503.03321, section 4 (who take heads from 0.2 on; an even "
        "head has more than that in most prompts, so none counts by it here)"
    )
    probe = "image"
    default = True
    needs_images = True
    drawn = 1

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"group_mass"}), n_groups=2)

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        sinks, others, rows = image_masses(layer, batch)
        mass = torch.where(rows, sinks + others, 0.0).sum(-1)
        return mass / rows.sum(-1)


def image_masses(
    layer: LayerStats, batch: ProbeBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mass on visual sinks and on the rest of the image, (batch, heads, queries) each, and which
    rows count, (batch, 1, queries) bool: words after the image."""
    mass = layer.group_mass
    rows = layer.queries & batch.info["after"].to(mass.device)
    sinks = mass[..., 2] if mass.shape[-1] > 2 else torch.zeros_like(mass[..., 1])
    return sinks, mass[..., 1], rows[:, None]


#: why a model has no visual sinks
NO_SINKS = (
    "the first token has no massive activation in the residual stream, |x[d]| ≥ τ·RMS(x), by which "
    "sinks are told (τ is 20, in streams narrower than 484 0.31·√width; a dimension in which the "
    "median token reaches τ tells none)"
)


class SinkScore(Score):
    """A score of the attention on an image's sinks and on the rest of it; `of` says which."""

    citation = "Kang et al. 2025 (ICLR), arXiv 2503.03321"
    probe = "image"
    default = True
    needs_images = True
    undefined = NO_SINKS

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(frozenset({"group_mass"}), n_groups=3)

    @abstractmethod
    def of(self, sinks: torch.Tensor, others: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(batch, heads) from what `image_masses` gives."""

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        """NaN for samples in which no dimension marks sinks in this layer."""
        values = self.of(*image_masses(layer, batch))
        defined = batch.info["defined"][layer.site.layer].to(values.device)
        return torch.where(defined[:, None], values, torch.nan)
