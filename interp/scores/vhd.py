"""Vision-aware head divergence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from interp.probes.image import image_batch
from interp.scores.score import ModelScore
from interp.vision.divergence import vhd
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.probes.settings import Settings
    from interp_hooks.model import HookedModel


class VHD(ModelScore):
    """‖a(with image) − a(image tokens removed)‖₂, a ∈ R^d_head the head's output before W_O at the
    prompt's last position, where the first word of the answer is made; a mean over pictures.
    `interp.vision.divergence.t_vhd` gives the sum over heads for every generated token.

    Misleads:
        Image tokens are taken out, not blanked: the text moves to other positions, and a head that
        follows positions moves with it. It is a length, so heads with large outputs lead. A head
        whose output changes need not look at the image itself: `image_excess` and `gaze` say that.
    """

    name = "vhd"
    title = "Vision-aware divergence"
    reading = (
        "How far a head's output moves when the image is taken out of the prompt: large in "
        "heads that see."
    )
    formula = "‖z_h(image, text) − z_h(text)‖₂ at the last position"
    citation = "He et al. 2025 (VHR, ACL), arXiv 2412.13949"
    high = None
    probe = "own"
    passes = "2 a picture, with and without it"
    default = True
    needs_images = True

    def cost(self, model: HookedModel, settings: Settings) -> int:
        (one,) = settings.pictures.inputs(model, limit=1)
        batch = image_batch(model, one)
        with_image, text = batch.tokens, batch.input_ids.numel() - int(batch.info["image"].sum())
        return (with_image + text) * settings.pictures.count()

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return settings.pictures.count()

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        for inputs in settings.pictures.inputs(model):
            by_layer = vhd(model, inputs)
            yield [
                (Head(n, h, model.main_tower), [float(v)])
                for n, row in by_layer.items()
                for h, v in enumerate(row[0])
            ]
