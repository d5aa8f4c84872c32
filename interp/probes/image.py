"""The probe of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError, InterpError
from interp.inputs.context import check_context
from interp.inputs.forward import forward
from interp.probes.probe import Callback, Probe, ProbeBatch
from interp.probes.settings import Settings
from interp.support.memory import is_out_of_memory
from interp.vision.patches import patch_grid, picture_size
from interp.vision.prompts import needs_image_tokens
from interp.vision.sinks import find_sinks
from interp.vision.towers import picture_tower, see, sees_alone
from interp_hooks.huggingface.images import image_mask
from interp_hooks.question import Question, SiteQuestion
from interp_hooks.recording import LayerStats

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

    A model that reads pictures alone is given the picture and no text: `input_ids` are (1, 0), and
    `info` holds config, pixels (height and width), slots (how many tokens it makes of the picture)
    and grids, a layer each (None where its tokens are no grid of patches).
    """

    name, what = "image", "pictures and what is in them"
    optional = True

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        raise TypeError("Pictures are read by a model's processor; use make.")

    def make(self, model: HookedModel, settings: Settings) -> list[ProbeBatch]:
        if not sees_alone(model):
            needs_image_tokens(model, "A probe of pictures")
        inputs = settings.pictures.inputs(model, told=True)
        if sees_alone(model) and inputs:
            layout = _layout(model, inputs[0])
            return [image_batch(model, one, layout) for one in inputs]
        return [image_batch(model, one) for one in inputs]

    def passes(self, batches: Sequence[ProbeBatch]) -> str:
        if batches[0].input_ids.shape[1]:
            return super().passes(batches)
        return f"{max(b.length for b in batches):,} × {len(batches)} pictures"

    def run(
        self, model: HookedModel, batch: ProbeBatch, question: Question, callback: Callback
    ) -> None:
        if sees_alone(model):
            with model.watch(question, callback):
                model(**batch.extra)
            return
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


def image_batch(
    model: HookedModel, given: dict[str, Any], layout: dict[str, Any] | None = None
) -> ProbeBatch:
    """A batch for `ImageProbe` from the inputs that `interp.vision.with_images` makes (one prompt
    or several), or from a picture alone.

    `layout`: what a model that reads pictures alone makes of such a picture; read off a run if
    None.
    """
    extra = dict(given)
    if "input_ids" not in extra:
        info = _layout(model, extra) if layout is None else dict(layout)
        return ProbeBatch(torch.zeros(1, 0, dtype=torch.long), None, info, 1, extra)
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


@torch.no_grad()
def _layout(model: HookedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """`info` of a picture alone, from a run on it. Raises `InputError` where the model does not run
    on a picture alone."""
    tower, config, pixels = picture_tower(model), model.module.config, picture_size(inputs)
    lengths: list[int] = []

    def note(stats: LayerStats) -> None:
        assert stats.call is not None
        if stats.site.tower == tower and stats.site.kind == "self":
            lengths.append(stats.call.n_keys)

    try:
        with model.watch(Question(call=True), note):
            see(model, inputs)
    except InterpError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{model.name} does not run on a picture alone: {reason}") from error
    return dict(
        config=config,
        pixels=pixels,
        slots=max(lengths, default=1),
        grids=tuple(patch_grid(config, length, pixels) for length in lengths),
    )
