"""The metric of a judged position: how far a model prefers right tokens to wrong ones.

Circuits, mechanics and accuracies share it, so that their numbers have one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from interp.errors import InputError

if TYPE_CHECKING:
    import torch

Judge = Literal["top1", "choice", "mass", "exact", "recall"]


def logit_margin(logits: torch.Tensor, right: Sequence[int], wrong: Sequence[int]) -> torch.Tensor:
    """(…,): the best right logit minus the mean wrong one, of `logits` (…, vocabulary); the
    vocabulary's mean stands for wrong tokens where none is named. Gradients flow.

    Example:
        >>> import torch
        >>> float(logit_margin(torch.tensor([3.0, 5.0, 1.0, 2.0]), right=[0, 1], wrong=[2, 3]))
        3.5
    """
    check_vocabulary(logits, (*right, *wrong))
    rivals = logits[..., list(wrong)] if len(wrong) else logits
    return logits[..., list(right)].amax(-1) - rivals.mean(-1)


def margin(
    row: torch.Tensor, accept: Sequence[int], wrong: Sequence[int], judge: Judge
) -> torch.Tensor:
    """How far the logits `row` (vocabulary,) prefer the accepted tokens, a tensor of one number:
    `logit_margin`; where no wrong token is named, the best accepted log-probability; under "mass",
    the difference of the two sets' probabilities, in [−1, 1]."""
    import torch

    check_vocabulary(row, (*accept, *wrong))
    if judge == "mass":
        p = torch.softmax(row, -1)
        return p[list(accept)].sum() - p[list(wrong)].sum()
    if not len(wrong):
        return row[list(accept)].max() - torch.logsumexp(row, -1)
    return logit_margin(row, accept, wrong)


def check_vocabulary(logits: torch.Tensor, tokens: Sequence[int]) -> None:
    """Raise `InputError` for an answer's token that the model has no logit of: its tokenizer knows
    more tokens than it does."""
    size = logits.shape[-1]
    if tokens and not 0 <= min(tokens) <= max(tokens) < size:
        token = max(tokens) if max(tokens) >= size else min(tokens)
        raise InputError(
            f"The model has no logit of token {token}, which an answer needs: it has {size}, and "
            "its tokenizer knows more; use the model's own tokenizer, or resize its embeddings."
        )
