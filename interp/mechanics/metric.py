"""What is attributed: the answer's logit minus the mean logit of the wrong answers, at judged
positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interp.inputs.tokenizer import pad_id
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
        """(n,) of `logits` (n, vocabulary): mean logit of the right tokens minus that of the wrong
        ones, or of the whole vocabulary where none is named."""
        found = []
        for row, right, wrong in zip(logits, self.right, self.wrong, strict=True):
            rivals = row[list(wrong)] if wrong else row
            found.append(row[list(right)].mean() - rivals.mean())
        return torch.stack(found)


def judged(model: HookedModel, instances: Sequence[Instance], first_only: bool = False) -> Judged:
    """A batch of `instances` on the model's device; `first_only`: prompts up to the first judged
    position."""
    batch = collate(instances, pad_id(model.tokenizer), "prompt" if first_only else "ids")
    places = [i.positions[:1] if first_only else i.positions for i in instances]
    rows = [b for b, p in enumerate(places) for _ in p]
    columns = [
        p + offset for found, offset in zip(places, batch.offset, strict=True) for p in found
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
