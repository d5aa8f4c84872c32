"""What is attributed at judged positions: the margin of `interp.tasks.metric`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from interp.inputs.tokenizer import pad_id
from interp.tasks.metric import logit_margin
from interp.tasks.task import Instance, collate

if TYPE_CHECKING:
    from interp_hooks import HookedModel


@dataclass(frozen=True)
class Judged:
    """Left-padded prompts and what is measured of them.

    `input_ids`, `attention_mask`: (batch, tokens); `rows`, `columns`: (n,) the judged positions;
    `right`, `wrong`: the tokens at each, `wrong` empty where any other token is.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    right: tuple[tuple[int, ...], ...]
    wrong: tuple[tuple[int, ...], ...]

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        """(n,) of `logits` (n, vocabulary): `interp.tasks.metric.logit_margin` of each judged
        position."""
        rows = zip(logits, self.right, self.wrong, strict=True)
        return torch.stack([logit_margin(row, right, wrong) for row, right, wrong in rows])

    def best(self, logits: torch.Tensor) -> Judged:
        """The same with the best right token of each position alone, by `logits` (n, vocabulary):
        what the metric is linear in."""
        best = tuple(
            (right[int(row[list(right)].argmax())],)
            for row, right in zip(logits, self.right, strict=True)
        )
        return replace(self, right=best)


def judged(model: HookedModel, instances: Sequence[Instance], first_only: bool = False) -> Judged:
    """A batch of `instances` on the model's device; `first_only`: prompts up to the first judged
    position."""
    batch = collate(instances, pad_id(model.tokenizer), "prompt" if first_only else "ids")
    places = [i.positions[:1] if first_only else i.positions for i in instances]
    rows = [b for b, p in enumerate(places) for _ in p]
    columns = [
        p + offset
        for positions, offset in zip(places, batch.offset, strict=True)
        for p in positions
    ]
    right = [a for i, p in zip(instances, places, strict=True) for a in i.accept[: len(p)]]
    wrong = [w for i, p in zip(instances, places, strict=True) for w in i.wrong[: len(p)]]
    device = model.device
    return Judged(
        batch.input_ids.to(device),
        batch.attention_mask.to(device),
        torch.tensor(rows, device=device),
        torch.tensor(columns, device=device),
        tuple(right),
        tuple(wrong),
    )
