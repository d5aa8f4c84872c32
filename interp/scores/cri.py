"""Heads that give the answer back: causal retrieval importance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from interp.inputs.endings import Ending, last_outputs, main_heads, put_back
from interp.probes.answer import AnswerProbe, answer_of
from interp.scores.score import ModelScore
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.probes.settings import Settings
    from interp_hooks.model import HookedModel


class CRI(ModelScore):
    """ln P(answer | other needle, z_h := z_h of the needle) − ln P(answer | other needle), from the
    row that predicts the answer's first token to its last.

    The prompt holds another needle, of the same length; one head's output, at the rows that predict
    the answer, is that of the prompt with the right one. Attention says where a head looks; this
    says whether what it brings back is the answer.

    Misleads:
        What one head brings back alone is little where several bring it and later layers ask for
        more than one; and a head that only moves what others fetched counts as much as they do.
    """

    name = "cri"
    title = "Causal retrieval importance"
    reading = (
        "How much more probable the needle's answer gets, where the prompt holds another needle, "
        "when this head alone reports the right one; nats."
    )
    formula = "ln P(y | x', z_h := z_h(x)) − ln P(y | x')"
    citation = "LOCOS, arXiv 2607.01002 (CRI)"
    unit = "nats"
    low = None
    high = None
    probe = "own"
    passes = "2 a problem, and its answer once a head"

    def cost(self, model: HookedModel, settings: Settings) -> int:
        answer = 8  # tokens, about
        return settings.samples * (2 * settings.context + answer * len(main_heads(model)))

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return settings.samples + 1

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        found: dict[Head, list[float]] = {head: [] for head in main_heads(model)}
        for batch in AnswerProbe().make(model, settings):
            for head, moved in _moves(model, batch.info["instance"]):
                found[head].append(moved)
            yield []
        yield list(found.items())


def _moves(model: HookedModel, instance: Any) -> Iterator[tuple[Head, float]]:
    """(head, nats) of one problem."""
    first, answer = instance.positions[0], answer_of(instance)
    last = len(instance.ids) - first
    rows = [p - first for p in instance.positions]
    values = last_outputs(model, instance.ids, last)
    # the other needle, and then the right answer's tokens
    other = [*instance.corrupted[: first + 1], *instance.ids[first + 1 :]]

    def read(logits: torch.Tensor) -> torch.Tensor:
        logp = logits[:, rows].float().log_softmax(-1)  # (rows, answer, vocabulary)
        said = torch.tensor(answer, device=logp.device)
        return logp.gather(-1, said[None, :, None].expand(len(logp), -1, 1)).sum((1, 2)).cpu()

    yield from put_back(Ending(model, other, last), values, read)
