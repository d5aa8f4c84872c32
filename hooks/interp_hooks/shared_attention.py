"""Attention whose heads several processes share out: what nobody edits stays where it is."""

from __future__ import annotations

from dataclasses import replace

import torch

from interp_hooks.blocks import Tap
from interp_hooks.call import AttentionCall
from interp_hooks.engine import attend, begin, check_finite
from interp_hooks.errors import TapError
from interp_hooks.head_shards import HeadShards
from interp_hooks.recording import LayerStats


def attend_shared(call: AttentionCall, tap: Tap) -> torch.Tensor:
    """z (batch, queries, own heads, d_head) of this process's heads; observers are told of all.

    A layer that no edit touches is attended by each process for its own heads, and what was asked
    of it is gathered. A layer under edits, or whose tensors or weights are asked for, is attended
    whole by every process, so that an edit means what it means in one process.

    Raises `TapError` for caches that hold keys head by head.
    """
    shards = call.shards
    assert shards is not None
    if call.holder is not None:
        raise TapError(
            "A cache that holds keys head by head does not know of heads that several processes "
            "share out (tensor parallelism); load the model in one process."
        )
    asked = [o.question.at(call.site) for o in tap.observers]
    needs_tensors = any(q.call or q.weights is not None for q in asked)
    edited = any(edit.touches(replace(call, shards=None)) for edit in tap.edits)
    if edited or needs_tensors or call.weights is not None:
        return shards.own(attend(call.whole(), tap), 2)
    attended = begin(replace(call, shards=None), tap)
    z = attended.z
    check_finite(call, z)
    for observer, answer in attended.answers:
        question = observer.question
        stats = LayerStats(attended.call, answer, question, z if question.z else None)
        observer.callback(_of_all(stats, shards))
    return z


def _of_all(stats: LayerStats, shards: HeadShards) -> LayerStats:
    """The statistics of all processes' heads."""
    for kind in ("rows", "pair_mass", "received"):
        told = getattr(stats, kind)
        setattr(stats, kind, {name: shards.whole(value, 1) for name, value in told.items()})
    if stats.z is not None:
        stats.z = shards.whole(stats.z, 2)
    return stats
