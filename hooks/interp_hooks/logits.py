"""The logits in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from interp_hooks.errors import TapError

#: what outputs call their logits
NAMES = ("logits", "prediction_logits", "start_logits", "logits_per_image")


def logits_of(out: Any) -> torch.Tensor:
    """(batch, tokens, vocabulary) of a model's output: a tensor, an output with `logits`, or a
    tuple that begins with them. Of models without a vocabulary what they answer with: starts of
    spans, similarities of pictures and texts, hidden states."""
    if isinstance(out, torch.Tensor):
        return out
    for name in NAMES:
        logits = getattr(out, name, None)
        if isinstance(logits, torch.Tensor):
            return logits
    values = out.values() if isinstance(out, Mapping) else out
    answers = (v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())
    answer = next((v for v in answers if v.ndim), None)
    if answer is None:
        raise TapError(f"A {type(out).__name__} holds no logits and no hidden states.")
    return answer
