"""Probes of needles in haystacks: the prompt read, and the answer written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from interp.inputs.batches import left_padded
from interp.inputs.chunks import watched
from interp.inputs.greedy import greedy
from interp.inputs.tokenizer import Text, pad_id, stop_tokens
from interp.probes.probe import Callback, Probe, ProbeBatch
from interp.probes.settings import Settings
from interp.tasks.floor import at_floor, described
from interp.tasks.niah import NeedleInAHaystack
from interp.tasks.posing import pose
from interp.tasks.task import Instance
from interp_hooks.logits import logits_of
from interp_hooks.question import Question

if TYPE_CHECKING:
    from interp.inputs.pace import Pace
    from interp_hooks.model import HookedModel


def needle_task(settings: Settings) -> NeedleInAHaystack:
    """The task at a quarter, a half and the whole of the context, in the format that is fixed (bare
    where none is yet)."""
    task = NeedleInAHaystack(
        haystack=settings.haystack,
        needle=settings.needle,
        question=settings.question,
        format="bare" if settings.format == "auto" else settings.format,
    )
    return task.at(settings.context)


def needles(tokenizer: Any, settings: Settings) -> Sequence[Instance]:
    """Needle problems of these settings."""
    return needle_task(settings).sample(tokenizer, settings.samples, settings.seed)


def settled(model: HookedModel, settings: Settings) -> tuple[Settings, str | None]:
    """The settings with the needles' format fixed, and how it was found where it was looked for."""
    if settings.format != "auto":
        return settings, None
    posed = pose(model, needle_task(settings))
    return replace(settings, format=posed.task.format), posed.note


class _NeedleProbe(Probe):
    """What both probes share: problems in a format, and scores only of a model that solves them."""

    posed = True

    def make(self, model: HookedModel, settings: Settings) -> list[ProbeBatch]:
        return self.batches(model.tokenizer, settled(model, settings)[0])

    def floor(
        self, model: HookedModel, batches: Sequence[ProbeBatch], outcomes: Sequence[float]
    ) -> str | None:
        task = batches[0].info["task"]
        if not outcomes or not at_floor(sum(outcomes), len(outcomes), task.chance):
            return None
        return described(model, task, [b.info["instance"] for b in batches], outcomes)


class QuestionProbe(_NeedleProbe):
    """A needle prompt (row 0) and the same with the question replaced by "N/A" (row 1),
    left-padded.

    `info`: needle and question (start, end) of each row, in padded slots.
    """

    name, what = "question", "needle prompts, with the question and with N/A"

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        batches = []
        reader = Text(tokenizer)
        for i in needles(tokenizer, settings):
            (n0, n1), (q0, q1) = i.info["needle"], i.info["question"]
            prompt = list(i.prompt)
            null = reader.encode(" N/A")
            empty = prompt[:q0] + null + prompt[q1:]
            ids, mask, pads = left_padded([prompt, empty], pad_id(tokenizer))
            questions = (q0, q1), (q0, q0 + len(null))
            spans = [
                ((n0 + pad, n1 + pad), (start + pad, stop + pad))
                for pad, (start, stop) in zip(pads, questions, strict=True)
            ]
            info = dict(spans=spans, instance=i, task=needle_task(settings))
            batches.append(ProbeBatch(ids, mask, info))
        return batches

    def run(
        self, model: HookedModel, batch: ProbeBatch, question: Question, callback: Callback
    ) -> None:
        out = watched(model, question, callback, batch.input_ids, batch.attention_mask, batch.chunk)
        token = int(logits_of(out)[0, -1].argmax())
        batch.info["begun"] = token in batch.info["instance"].accept[0]

    def outcome(self, batch: ProbeBatch) -> float | None:
        """1 where the right answer is begun; None in the format paper, which allows any words."""
        free = batch.info["task"].judge == "recall"
        return None if free else float(batch.info["begun"])


class NeedleProbe(_NeedleProbe):
    """Greedy decoding after a needle prompt: the prompt but its last token is prefilled, then each
    step is watched.

    After `run`, `info["generated"]` holds the greedy tokens and `info["solved"]` whether they are
    the answer.
    """

    name, what = "needle", "needle in a haystack, greedy decode"

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        return [
            ProbeBatch(torch.tensor([i.prompt]), None, dict(instance=i, task=needle_task(settings)))
            for i in needles(tokenizer, settings)
        ]

    def run(
        self, model: HookedModel, batch: ProbeBatch, question: Question, callback: Callback
    ) -> None:
        instance, task = batch.info["instance"], batch.info["task"]
        free = task.judge == "recall"
        steps = instance.info["steps"] if free else len(instance.accept)
        stop = stop_tokens(model) | set(instance.info["ends"]) if free else ()
        generated = greedy(
            model,
            batch.input_ids,
            steps,
            stop,
            lambda: model.watch(question, callback),
            batch.chunk,
        )
        batch.info["generated"] = generated
        if free:
            batch.info["solved"] = task.heard(model.tokenizer, instance, generated)[0] > 0
        else:
            batch.info["solved"] = all(
                t in ok for t, ok in zip(generated, instance.accept, strict=True)
            )

    def seconds(self, batch: ProbeBatch, pace: Pace) -> float:
        instance, length = batch.info["instance"], batch.input_ids.shape[1]
        steps = instance.info.get("steps", len(instance.accept))
        if not pace.model.has_cache:
            return pace.watched(steps, length)
        return pace.plain(1, length) + steps * pace.step()

    def passes(self, batches: Sequence[ProbeBatch]) -> str:
        instance = batches[0].info["instance"]
        steps = instance.info.get("steps", len(instance.accept))
        return f"{super().passes(batches)}, then {steps} steps"

    def outcome(self, batch: ProbeBatch) -> float | None:
        """1 where the needle was found."""
        return float(batch.info["solved"])

    def remarks(
        self, tokenizer: Any, batches: Sequence[ProbeBatch], outcomes: Sequence[float]
    ) -> list[str]:
        if not outcomes:
            return []
        return [
            f"retrieval: measured on the {int(sum(outcomes))} of {len(outcomes)} needle problems "
            "solved."
        ]
