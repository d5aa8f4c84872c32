"""How far a changed model's next-token distributions are from the model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interp.circuits.runs.prompts import Pairs


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """(…, vocabulary) float64."""
    return logits.double().log_softmax(-1)


def divergence(wanted: Sequence[torch.Tensor], pairs: Pairs, logits: torch.Tensor) -> torch.Tensor:
    """Σ over prompts of the mean KL(wanted ‖ found) over their judged positions, a tensor of one
    number; `wanted` are log probabilities (judged positions, vocabulary) of each prompt."""
    each = zip(wanted, pairs.judged(logits), strict=True)
    return torch.stack(
        [(own.exp() * (own - log_probabilities(rows))).sum(-1).mean() for own, rows in each]
    ).sum()
