"""Which kv heads keep the whole text, for a share of its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from interp.edits.gate import Gate
from interp.errors import InputError
from interp.support.checked import number, whole_number

if TYPE_CHECKING:
    from interp.results.head_table import HeadTable

#: tokens that a streaming head holds, where the budget allows (StreamingLLM's first tokens)
SINK, RECENT = 4, 64


def full_heads(
    kv_heads: int, budget: float, context: int, sink: int = SINK, recent: int = RECENT
) -> int:
    """How many kv heads may keep everything, so that all together hold `budget` of the keys.

    Of n kv heads f keep all L tokens and n − f keep s + r: f = n·(b − w) / (1 − w) with
    w = (s + r) / L, rounded down.

    Raises:
        InputError: a budget outside (0, 1], or one that not even streaming heads alone keep to.

    Example:
        >>> from interp.caches.choosing import full_heads
        >>> full_heads(16, 0.5, 1024, sink=4, recent=60)
        7
    """
    budget, context = number(budget, "The budget"), whole_number(context, "The context")
    if not 0 < budget <= 1:
        raise InputError(
            f"A budget is a share of the cache's memory, between 0 and 1, not {budget:g}."
        )
    streaming = (sink + recent) / context
    if streaming > budget or streaming >= 1:
        raise InputError(
            f"At {context} tokens the {sink} first and {recent} recent ones alone are "
            f"{streaming:.2f} of a head's keys; take a longer context, a larger budget, or fewer "
            "recent tokens."
        )
    return int(kv_heads * (budget - streaming) / (1 - streaming) + 1e-9)


def gate_for(
    atlas: HeadTable,
    budget: float,
    context: int,
    score: str = "retrieval",
    sink: int = SINK,
    recent: int = RECENT,
    n_kv_heads: int | None = None,
) -> Gate:
    """The gate whose kv heads of the highest score keep everything, within a budget.

    A kv head counts as the strongest query head that reads it; of equals the earlier layer's comes
    first. Heads that were not measured count as the weakest.

    Args:
        atlas: a scan with the score, or a table read from another project's file.
        budget: share of the cache's memory at `context` tokens.
        context: tokens that the text will have.
        score: its name.
        sink, recent: what a streaming head holds.
        n_kv_heads: kv heads a layer; None for what the atlas knows.

    Raises:
        InputError: an impossible budget, or heads that don't divide into kv heads.
        UnknownNameError: a score that is not there.

    Example:
        >>> gate = interp.caches.gate_for(
        ...     atlas, 0.5, 1024, "previous_token", recent=60, n_kv_heads=4
        ... )
        >>> int((gate.alpha == 1).sum())
        7
    """
    table = np.ma.filled(atlas.matrix(score).astype(float), -np.inf)  # (layers, heads)
    layers, heads = table.shape
    kv_heads = n_kv_heads or heads
    if heads % kv_heads:
        raise InputError(f"{heads} heads don't read {kv_heads} kv heads in equal groups.")
    strength = table.reshape(layers, kv_heads, -1).max(-1)
    return gate_of(strength, budget, context, sink, recent)


def gate_of(strength: np.ndarray, budget: float, context: int, sink: int, recent: int) -> Gate:
    """`gate_for` from numbers (layers, kv_heads)."""
    full = full_heads(strength.size, budget, context, sink, recent)
    order = np.argsort(-strength, axis=None, kind="stable")
    alpha = torch.zeros(strength.size)
    alpha[torch.from_numpy(order[:full].copy())] = 1.0
    return Gate(alpha.reshape(strength.shape), sink=sink, recent=recent)
