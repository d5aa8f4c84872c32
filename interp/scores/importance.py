"""Importance of a head: what the model loses without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from interp.edits.scale_heads import ScaleHeads
from interp.inputs.forward import forward
from interp.scores.score import ModelScore
from interp_hooks.heads import Head
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp.inputs.pace import Pace
    from interp.probes.settings import Settings
    from interp_hooks.model import HookedModel

LENGTH = 256


class Importance(ModelScore):
    """loss(head's z = 0) − loss: rise of the mean next-token loss on text, one pass a head and
    sample.

    Misleads:
        Heads go one at a time, so heads that stand in for each other hide one another. Loss on
        prose hardly asks for copying: without its eight strongest retrieval heads SmolLM2's loss on
        English stays at 4.03 and it finds no needle.
    """

    name = "importance"
    title = "Importance"
    reading = (
        "How much the next-token loss on text rises when this head is removed; negative "
        "heads are better off. `importance_gradient` estimates it in one backward."
    )
    formula = "loss(z_h := 0) − loss"
    citation = "Michel et al. 2019, arXiv 1905.10650"
    unit = "nats"
    low = None
    high = None
    length = LENGTH
    probe = "own"
    passes = "1 a head and sample"

    def cost(self, model: HookedModel, settings: Settings) -> int:
        return settings.samples * min(LENGTH, settings.context) * (len(heads(model)) + 1)

    def seconds(self, model: HookedModel, settings: Settings, pace: Pace) -> float:
        length = min(LENGTH, settings.context)
        runs = len(heads(model)) + 1
        rows = runs * settings.samples
        return pace.of("loss", lambda ids: _losses(model, ids.cpu()), rows, length)

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return len(heads(model))

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        length = min(LENGTH, settings.context)
        rows = torch.tensor(settings.rows(model.tokenizer, length))
        plain = _losses(model, rows)
        for head in heads(model):
            with model.edit(ScaleHeads({head: 0.0})):
                yield [(head, (_losses(model, rows) - plain).tolist())]


def heads(model: HookedModel) -> list[Head]:
    """All heads but a vision tower's, which text does not pass."""
    return [h for h in model.heads if h.tower != "vision"]


@torch.no_grad()
def _losses(model: HookedModel, rows: torch.Tensor) -> torch.Tensor:
    """(samples,) mean next-token loss in nats."""
    out = forward(model, rows)
    logits = logits_of(out).float().cpu()
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none"
    )
    return loss.mean(-1)
