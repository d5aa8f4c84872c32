"""The logits in what a model returns."""

from __future__ import annotations

from typing import Any

import torch


def logits_of(out: Any) -> torch.Tensor:
    """(batch, tokens, vocabulary) of a model's output: a tensor, an output with `logits`, or a
    tuple that begins with them."""
    if isinstance(out, torch.Tensor):
        return out
    logits = getattr(out, "logits", None)
    return out[0] if logits is None else logits
