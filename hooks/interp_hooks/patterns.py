"""Attention whose pattern someone else computed (TransformerLens): what is told of it, and what
steers make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from interp_hooks.blocks import Observer
from interp_hooks.call import AttentionCall
from interp_hooks.recording import LayerStats
from interp_hooks.shown_weights import hand_rows
from interp_hooks.steered import Steered
from interp_kernels import Request, Result, pattern_statistics, steer_pattern


def steered_pattern(call: AttentionCall, steers: Sequence[Steered]) -> AttentionCall:
    """The call with its pattern after the steers, gains left out (`gains` gives them)."""
    assert call.pattern is not None
    pattern = call.pattern
    for s in steers:
        new = steer_pattern(pattern, call.mask, [replace(s.steer, gain=None)])
        start, stop = s.rows
        pattern = torch.cat([pattern[:, :, :start], new[:, :, start:stop], pattern[:, :, stop:]], 2)
    return replace(call, pattern=pattern) if steers else call


def pattern_result(call: AttentionCall, request: Request) -> Result:
    """Statistics from the call's pattern; out and lse, which nobody asks for, are the values."""
    assert call.pattern is not None
    return Result(call.value, call.value, pattern_statistics(call.pattern, call.mask, request))


def answer_from_pattern(
    call: AttentionCall, observers: Sequence[Observer], z: torch.Tensor | None
) -> None:
    """The same from a pattern that someone else computed (TransformerLens)."""
    for observer in observers:
        wanted = observer.question.at(call.site).weights
        if wanted is not None:
            hand_rows(call, wanted)
        answer = pattern_result(call, observer.question.request(call))
        observer.callback(
            LayerStats(call, answer, observer.question, z if observer.question.z else None)
        )
