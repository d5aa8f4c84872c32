"""The probe of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from interp.inputs.context import check_context
from interp.inputs.forward import forward
from interp.probes.probe import Callback, Probe, ProbeBatch
from interp.probes.settings import Settings
from interp.vision.prompts import needs_image_tokens
from interp.vision.sinks import find_sinks
from interp_hooks.huggingface.images import image_mask
from interp_hooks.question import Question, SiteQuestion

if TYPE_CHECKING:
    from interp_hooks.call import Site
    from interp_hooks.heads import Head
    from interp_hooks.model import HookedModel


class ImageProbe(Probe):
    """A picture and a text about it, one a batch. `info`: image and after, (batch, slots) bool, the
    image's tokens and the words after the last of them; config, the model's.

    A question with groups is asked of 0 words, 1 the image, and, where it asks for 3 groups, 2 the
    image's sinks: its tokens with φ(x) = max_{d in D} |x[d]| / RMS(x) ≥ τ on entry of the layer
    (`tau_of`: 20, in narrow streams less). D is published for the model, or else where |x[d]| /
    RMS(x) ≥ τ at the sample's first real token, its massive activations there; either without the
    dimensions in which the median token reaches τ, a bias of the stream. `info["defined"]`: layer →
    (batch,) bool, whether there is such a d; the outcome is how many of the image's tokens are
    sinks, a mean over the layers that have one.
    """

    name, what = "image", "pictures and what is in them"
    optional = True

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        raise TypeError("Pictures are read by a model's processor; use make.")

    def make(self, model: HookedModel, settings: Settings) -> list[ProbeBatch]:
        needs_image_tokens(model, "A probe of pictures")
        return [image_batch(model, inputs) for inputs in settings.pictures.inputs(model, told=True)]

    def run(
        self, model: HookedModel, batch: ProbeBatch, question: Question, callback: Callback
    ) -> None:
        image, real = batch.info["image"], batch.attention_mask
        first = (image.new_ones(image.shape) if real is None else real).int().argmax(1)
        sinks: dict[int, torch.Tensor] = {}
        defined = batch.info["defined"] = {}

        def note(place: str, layer: int, stream: torch.Tensor) -> None:
            residual.clear()  # nothing is kept but which tokens are sinks
            if place == "pre" and needs_sinks:
                sinks[layer], defined[layer] = find_sinks(model, stream, first, real, image)

        def choose(site: Site) -> Question:
            at_site = question.at(site)
            if not at_site.n_groups or site.tower == "vision":
                return at_site
            labels = image.long()
            if at_site.n_groups > 2 and site.layer in sinks:
                labels = labels * (1 + sinks[site.layer].to(labels))
            return replace(at_site, labels=labels)

        needs_sinks = any(question.at(site).n_groups > 2 for site in model.sites)
        asking = SiteQuestion(names=question.names, z=question.z, call=question.call, choose=choose)
        with model.capture_resid(note) as residual, model.watch(asking, callback):
            forward(model, batch.input_ids, batch.attention_mask, keep=1, **batch.extra)
        counts = [
            float((found & image.to(found.device)).sum(1)[defined[layer]].float().mean())
            for layer, found in sinks.items()
            if bool(defined[layer].any())
        ]
        batch.info["sinks"] = sum(counts) / len(counts) if counts else None

    def outcome(self, batch: ProbeBatch) -> float | None:
        return batch.info.get("sinks")

    def remarks(
        self, tokenizer: Any, batches: Sequence[ProbeBatch], outcomes: Sequence[float]
    ) -> list[str]:
        if not outcomes:
            return []
        tokens = sum(int(b.info["image"].sum()) for b in batches) / sum(
            len(b.input_ids) for b in batches
        )
        return [
            f"visual sinks: {sum(outcomes) / len(outcomes):.3g} of a picture's {tokens:.4g} tokens "
            "are sinks, a mean over pictures and over the layers that have a dimension to tell "
            "them by."
        ]

    def overlays(self, model: HookedModel, settings: Settings, heads: Sequence[Head]) -> list[Any]:
        """The first picture under these heads. Raises `InputError` where its tokens are no grid."""
        from interp.vision.overlay import overlay

        prompt, picture = settings.pictures.shown()
        return [overlay(model, picture, prompt, list(heads))]


def image_batch(model: HookedModel, given: dict[str, Any]) -> ProbeBatch:
    """A batch for `ImageProbe` from the inputs that `interp.vision.with_images` makes (one prompt
    or several)."""
    extra = dict(given)
    ids, real = extra.pop("input_ids"), extra.pop("attention_mask", None)
    check_context(model, ids.shape[1])
    image = image_mask(model.module.config, ids, extra)
    assert image is not None
    slots = torch.arange(1, ids.shape[1] + 1)
    after = slots > torch.where(image, slots, 0).amax(-1, keepdim=True)
    if real is not None:
        after &= real.bool()
    info = dict(image=image, after=after, config=model.module.config)
    return ProbeBatch(ids, real, info, len(ids), extra)
