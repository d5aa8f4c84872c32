"""Probes of rendered scenes in which it is known where the thing is that the words speak of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from interp.inputs.context import check_context
from interp.inputs.forward import forward
from interp.probes.probe import Callback, Probe, ProbeBatch
from interp.probes.settings import Settings
from interp.vision.things import asked, told
from interp_hooks.huggingface.images import image_mask
from interp_hooks.logits import logits_of
from interp_hooks.question import Question

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel


class _ThingProbe(Probe):
    """What both share: they are made by a model's processor, from scenes alone."""

    optional = True

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        raise TypeError("Pictures are read by a model's processor; use make.")

    def run(
        self, model: HookedModel, batch: ProbeBatch, question: Question, callback: Callback
    ) -> None:
        with model.watch(question, callback):
            forward(model, batch.input_ids, batch.attention_mask, keep=1, **batch.extra)


class NamedProbe(_ThingProbe):
    """A scene and its true caption (teacher forcing), one a batch. `info`: image, (1, slots) bool;
    looked, a list of `interp.vision.things.Looked`, one for each thing of the caption: its row is
    the token before the thing's word. After `run` `said`, whether each of these rows predicts the
    word's first token; the outcome is their share."""

    name, what = "named", "rendered scenes, told truly"

    def make(self, model: HookedModel, settings: Settings) -> list[ProbeBatch]:
        return [_batch(model, inputs, found) for inputs, found in told(model, settings.pictures)]

    def run(
        self, model: HookedModel, batch: ProbeBatch, question: Question, callback: Callback
    ) -> None:
        looked, length = batch.info["looked"], batch.input_ids.shape[1]
        first = min((look.rows[0] for look in looked), default=length - 1)
        with model.watch(question, callback):
            out = forward(
                model, batch.input_ids, batch.attention_mask, keep=length - first, **batch.extra
            )
        logits = logits_of(out)[0]
        start = length - len(logits)  # models that keep all rows start at 0
        batch.info["said"] = [
            int(logits[look.rows[0] - start].argmax()) == look.word[0] for look in looked
        ]

    def outcome(self, batch: ProbeBatch) -> float | None:
        said = batch.info["said"]
        return sum(said) / len(said) if said else None

    def remarks(
        self, tokenizer: Any, batches: Sequence[ProbeBatch], outcomes: Sequence[float]
    ) -> list[str]:
        if not outcomes:
            return []
        return [
            f"named things: the model itself would say {sum(outcomes) / len(outcomes):.0%} of the "
            "words at which heads were watched, a mean over scenes."
        ]


class AskedProbe(_ThingProbe):
    """A scene and the question whether a thing is there that is (row 0), and the same about nothing
    (row 1), left-padded. `info`: image, (2, slots) bool; looked, a `Looked` for each row, whose
    rows are the question's tokens."""

    name, what = "asked", "rendered scenes, a thing asked about, and nothing"

    def make(self, model: HookedModel, settings: Settings) -> list[ProbeBatch]:
        return [_batch(model, inputs, found) for inputs, found in asked(model, settings.pictures)]


def _batch(model: HookedModel, inputs: dict[str, Any], looked: list[Any]) -> ProbeBatch:
    extra = dict(inputs)
    ids, real = extra.pop("input_ids"), extra.pop("attention_mask", None)
    check_context(model, ids.shape[1])
    image = image_mask(model.module.config, ids, extra)
    assert isinstance(image, torch.Tensor)
    return ProbeBatch(ids, real, dict(image=image, looked=looked), 1, extra)
