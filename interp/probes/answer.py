"""Needle problems with their answers given: one forward, nothing generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from interp.inputs.forward import forward
from interp.probes.needle import NeedleProbe
from interp.probes.probe import Callback, Probe, ProbeBatch
from interp.probes.settings import Settings
from interp_hooks.errors import TapError
from interp_hooks.logits import logits_of
from interp_hooks.question import Question

if TYPE_CHECKING:
    from interp.inputs.pace import Pace
    from interp.tasks.task import Instance
    from interp_hooks.call import Site
    from interp_hooks.model import HookedModel


class AnswerProbe(NeedleProbe):
    """The problems of `NeedleProbe`, prompt and right answer in one forward (teacher forcing).

    `info`: `instance`, its `positions` the rows that predict the answer's tokens; after `run`,
    `solved`, whether each of them predicts the right one, and, where the question asks for calls,
    `toward`: site → (heads, steps, d_head), what a head's z is worth to the token of each step,
    W_O,h u_y, u_y the token's column of W_U; None where the model's W_O or W_U can't be read.
    """

    name, what = "answer", "needle in a haystack, the answer given"

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        return [given(b.info["instance"]) for b in super().batches(tokenizer, settings)]

    def make(self, model: HookedModel, settings: Settings) -> list[ProbeBatch]:
        return [given(b.info["instance"]) for b in super().make(model, settings)]

    def run(
        self, model: HookedModel, batch: ProbeBatch, question: Question, callback: Callback
    ) -> None:
        instance: Instance = batch.info["instance"]
        if question.call:
            batch.info["toward"] = toward(model, answer_of(instance))
        first = instance.positions[0]
        with model.watch(question, callback):
            out = forward(model, batch.input_ids, keep=len(instance.ids) - first)
        logits = logits_of(out)[0]
        start = len(instance.ids) - len(logits)  # models that keep all rows start at 0
        said = [int(logits[p - start].argmax()) for p in instance.positions]
        batch.info["solved"] = all(t in ok for t, ok in zip(said, instance.accept, strict=True))

    def seconds(self, batch: ProbeBatch, pace: Pace) -> float:
        return Probe.seconds(self, batch, pace)

    def floor(
        self, model: HookedModel, batches: Sequence[ProbeBatch], outcomes: Sequence[float]
    ) -> str | None:
        """None: with its answer given, a problem says something of the heads of a model that does
        not solve it too."""
        return None

    def passes(self, batches: Sequence[ProbeBatch]) -> str:
        return Probe.passes(self, batches)

    def remarks(
        self, tokenizer: Any, batches: Sequence[ProbeBatch], outcomes: Sequence[float]
    ) -> list[str]:
        if not outcomes:
            return []
        return [
            f"answers given: the model predicts every token of {int(sum(outcomes))} of "
            f"{len(outcomes)} of them; retrieval_forced and locos count all."
        ]


def given(instance: Instance) -> ProbeBatch:
    """A batch of one problem with its answer."""
    return ProbeBatch(torch.tensor([[*instance.ids]]), None, dict(instance=instance))


def answer_of(instance: Instance) -> list[int]:
    """The answer's tokens, one a judged position. They stand behind these positions, all but the
    last, which nothing needs to read."""
    ids = instance.ids
    return [
        ids[p + 1] if p + 1 < len(ids) else accepted[0]
        for p, accepted in zip(instance.positions, instance.accept, strict=True)
    ]


def toward(model: HookedModel, tokens: Sequence[int]) -> Callable[[Site], torch.Tensor] | None:
    """site → (heads, steps, d_head) float32: W_O,h u_y for the token y of each step; None where W_O
    or W_U can't be read."""
    try:
        unembedding = model.vocabulary().W_U  # (d_model, vocabulary)
        u = unembedding[:, list(tokens)].float()  # (d_model, steps)
        worth = {
            site: torch.einsum(
                "hdm,ms->hsd", model.head_weights(site.layer, site.tower).W_O.float(), u
            )
            for site in model.sites
            if site.is_main
        }
    except TapError:
        return None
    return worth.__getitem__
