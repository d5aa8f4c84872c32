"""Probes of needles in haystacks: the prompt read, and the answer written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from interp.inputs.batches import left_padded
from interp.inputs.forward import forward
from interp.inputs.tokenizer import Text, pad_id
from interp.probes.probe import Callback, Probe, ProbeBatch
from interp.probes.settings import Settings
from interp.tasks.niah import NeedleInAHaystack
from interp.tasks.task import Instance
from interp_hooks.logits import logits_of
from interp_hooks.question import Question

if TYPE_CHECKING:
    from interp.inputs.pace import Pace
    from interp_hooks.model import HookedModel


def needles(tokenizer: Any, settings: Settings) -> Sequence[Instance]:
    """Needle problems at a quarter, a half and the whole of the context."""
    return (
        NeedleInAHaystack().at(settings.context).sample(tokenizer, settings.samples, settings.seed)
    )


class QuestionProbe(Probe):
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
            batches.append(ProbeBatch(ids, mask, dict(spans=spans)))
        return batches


class NeedleProbe(Probe):
    """Greedy decoding after a needle prompt: the prompt but its last token is prefilled, then each
    step is watched.

    After `run`, `info["generated"]` holds the greedy tokens and `info["solved"]` whether they are
    the answer.
    """

    name, what = "needle", "needle in a haystack, greedy decode"

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        return [
            ProbeBatch(torch.tensor([i.prompt]), None, dict(instance=i))
            for i in needles(tokenizer, settings)
        ]

    def run(
        self, model: HookedModel, batch: ProbeBatch, question: Question, callback: Callback
    ) -> None:
        instance = batch.info["instance"]
        generated: list[int] = []
        ids = batch.input_ids
        steps = len(instance.accept)
        cache: dict[str, Any] = {}
        if model.has_cache:
            out = forward(model, ids[:, :-1], keep=1, use_cache=True)
            cache, ids = dict(past_key_values=out.past_key_values, use_cache=True), ids[:, -1:]
        for _ in range(steps):
            with model.watch(question, callback):
                out = forward(model, ids, keep=1, **cache)
            logits = logits_of(out)
            token = logits[:, -1].argmax(-1, keepdim=True).cpu()
            generated.append(int(token))
            ids = token if cache else torch.cat([ids, token], 1)
        batch.info["generated"] = generated
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
        steps = len(batches[0].info["instance"].accept)
        return f"{super().passes(batches)} + {steps} steps"

    def outcome(self, batch: ProbeBatch) -> float | None:
        """1 where the needle was found."""
        return float(batch.info["solved"])

    def remarks(
        self, tokenizer: Any, batches: Sequence[ProbeBatch], outcomes: Sequence[float]
    ) -> list[str]:
        if not outcomes:
            return []
        if not any(outcomes):
            return [
                "retrieval: task not solved (needle accuracy 0.00), so retrieval heads can't be "
                "told."
            ]
        return [
            f"retrieval: measured on the {int(sum(outcomes))} of {len(outcomes)} needle problems "
            "solved."
        ]
