"""Importance of the vision tower's heads: what the model answers without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from interp.edits.scale_heads import ScaleHeads
from interp.errors import InputError
from interp.probes.image import image_batch
from interp.scores.score import ModelScore
from interp.vision.towers import picture_tower, see, sees_alone
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.probes.settings import Settings
    from interp_hooks.model import HookedModel


class ViTImportance(ModelScore):
    """KL(p ‖ p without the head) of the next token after a prompt with a picture, z of the head :=
    0 in the vision tower; one pass a head and sample. Heads after the layer whose features the
    language model gets have 0. Of a classifier that reads pictures alone p is over its classes;
    other models without text give no answer and have no value.

    Misleads:
        It is of the next word after one prompt: a head that matters for another question shows
        nothing. The divergence does not tell better from worse.
    """

    name = "vit_importance"
    title = "Importance for the answer"
    reading = (
        "How much the model's next word about the picture, or its class, changes when this head "
        "of the vision tower is removed."
    )
    formula = "KL(p(next or class | picture) ‖ p(next or class | picture; z_h := 0))"
    citation = "after Michel et al. 2019, arXiv 1905.10650 (pruning heads)"
    unit = "nats"
    high = None
    probe = "own"
    passes = "1 a head and sample"
    needs_images = True
    tower = "vision"

    def cost(self, model: HookedModel, settings: Settings) -> int:
        (one,) = settings.pictures.inputs(model, limit=1)
        if sees_alone(model):
            _answer(model, one)  # raises for models that give none
        return image_batch(model, one).tokens * settings.pictures.count() * (len(heads(model)) + 1)

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return len(heads(model))

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        prompts = settings.pictures.inputs(model)
        plain = [_answer(model, inputs) for inputs in prompts]
        for head in heads(model):
            with model.edit(ScaleHeads({head: 0.0})):
                without = [_answer(model, inputs) for inputs in prompts]
            pairs = zip(plain, without, strict=True)
            yield [(head, [max(0.0, float((p.exp() * (p - q)).sum())) for p, q in pairs])]


def heads(model: HookedModel) -> list[Head]:
    """The vision tower's heads."""
    return [h for h in model.heads if h.tower == picture_tower(model)]


@torch.no_grad()
def _answer(model: HookedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(vocabulary,) float64: log p of the next token; (classes,) of a model that reads pictures
    alone. Raises `InputError` where that gives no one answer."""
    logits = getattr(see(model, inputs), "logits", None)
    if "input_ids" in inputs:
        assert logits is not None
        return logits[0, -1].double().log_softmax(-1).cpu()
    kind = getattr(model.module.config, "problem_type", None) or "single_label_classification"
    is_one = kind == "single_label_classification"
    if logits is None or logits.ndim != 2 or logits.shape[1] < 2 or not is_one:
        raise InputError(
            f"vit_importance compares a model's answers, and {model.name} gives none: it is no "
            "classifier with one right class."
        )
    return logits[0].double().log_softmax(-1).cpu()
