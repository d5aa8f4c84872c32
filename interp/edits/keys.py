"""Sets of keys that an edit names, in the columns of one attention call, and ranges of its query
rows.

A set is "initial" (each sample's first real token), "image" (the image tokens of the prompt at
hand, in a vision-language model), a span (start, stop) or a list of token positions, counted from
each sample's first real token, or a (batch, slots) bool tensor over the padded sequence. In JSON a
span is "2:5".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from interp.errors import EditError

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall

KeySet = Any  # "initial" | "image" | (start, stop) | [position, …] | tensor


class Span(NamedTuple):
    """Token positions start … stop − 1; a type of its own, as in JSON [2, 5] are the positions 2
    and 5."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


def check(keys: KeySet) -> KeySet:
    """`keys` in its stored form (a word, `Span`, list or tensor). Raises `EditError` if it is none
    of the kinds."""
    if isinstance(keys, torch.Tensor):
        if keys.ndim != 2:
            raise EditError(f"A tensor of keys is (batch, slots), not {tuple(keys.shape)}.")
        return keys.bool()
    if isinstance(keys, str):
        if keys in ("initial", "image"):
            return keys
        if written := re.fullmatch(r"(\d+):(\d+)", keys):
            keys = int(written[1]), int(written[2])
    if (
        isinstance(keys, str)
        or not isinstance(keys, Sequence)
        or not all(isinstance(k, int) and k >= 0 for k in keys)
    ):
        raise EditError(
            'Keys are "initial", "image", a span (start, stop), in JSON "start:stop", a list of '
            "positions, or a "
            f"tensor, not {keys!r}."
        )
    if isinstance(keys, tuple) and len(keys) == 2:
        if keys[0] > keys[1]:
            raise EditError(f"A span of keys ends before it starts: {keys}.")
        return Span(*keys)
    return list(keys)


def spans_of(keys: KeySet) -> list[tuple[int, int]]:
    """Token spans of a set that is known without an input (`known`)."""
    if keys == "initial":
        return [(0, 1)]
    if isinstance(keys, Span):
        return [(keys.start, keys.stop)]
    spans: list[tuple[int, int]] = []
    for position in sorted(set(keys)):
        if spans and spans[-1][1] == position:
            spans[-1] = spans[-1][0], position + 1
        else:
            spans.append((position, position + 1))
    return spans


def known(keys: KeySet) -> bool:
    """Whether a set's positions are known without an input: not a tensor, and not the image."""
    return not isinstance(keys, torch.Tensor) and keys != "image"


def slots_of(call: AttentionCall, keys: KeySet) -> torch.Tensor | None:
    """(batch, slots) bool of a set that is given by slots: a tensor, or the image's tokens at hand;
    None for others. Raises `EditError` where there is no image."""
    if isinstance(keys, torch.Tensor):
        return keys
    if keys != "image":
        return None
    if call.images is None or not bool(call.images.any()):
        raise EditError(
            'The keys "image" are the image tokens of the prompt, and this prompt has none.'
        )
    return call.images


def overlap(one: KeySet, other: KeySet) -> bool:
    """Whether two sets share a key, as far as this is known without an input."""
    if all(isinstance(keys, torch.Tensor) for keys in (one, other)):
        width = min(one.shape[1], other.shape[1])
        return bool((one[:, :width] & other[:, :width].to(one.device)).any())
    if not (known(one) and known(other)):
        return isinstance(one, str) and isinstance(other, str) and one == other
    return any(a < d and c < b for a, b in spans_of(one) for c, d in spans_of(other))


def query_positions(call: AttentionCall) -> torch.Tensor:
    """(batch or 1, queries) int64: the token position of each row, negative in left padding."""
    return _from_start(
        call, torch.arange(call.n_queries, device=call.value.device) + call.mask.q_start
    )


def query_rows(call: AttentionCall, queries: tuple[int, int | None] | None) -> torch.Tensor | None:
    """(batch, queries) bool: the rows of tokens start … stop − 1; None for all."""
    if queries is None:
        return None
    position, (start, stop) = query_positions(call), queries
    rows = position >= start
    return (rows if stop is None else rows & (position < stop)).expand(call.batch, -1)


def member(call: AttentionCall, keys: KeySet) -> torch.Tensor:
    """(batch or 1, keys) bool: the columns of a set."""
    slots = torch.arange(call.n_keys, device=call.value.device) + call.mask.k_start
    marks = slots_of(call, keys)
    if marks is not None:
        part = per_sample(call, marks)[:, call.mask.k_start : call.mask.k_start + call.n_keys]
        return torch.nn.functional.pad(part, (0, call.n_keys - part.shape[1]))
    position = _from_start(call, slots)
    here = torch.zeros_like(position, dtype=torch.bool)
    for a, b in spans_of(keys):
        here |= (position >= a) & (position < b)
    return here


def per_sample(call: AttentionCall, values: torch.Tensor, what: str = "keys") -> torch.Tensor:
    """(batch or 1, …): a tensor of keys, or of `what`, for the call's samples; with beams each
    sample's own, repeated."""
    samples = values.shape[0]
    if samples not in (1, call.batch):
        if call.batch % samples:
            raise EditError(
                f"A tensor of {what} for {samples} samples meets a batch of {call.batch}."
            )
        values = values.repeat_interleave(call.batch // samples, 0)
    return values.to(call.value.device)


def groups(call: AttentionCall, sets: Sequence[KeySet]) -> dict[str, Any]:
    """`spans=` or `labels=` of a `Steer`: set i is group i + 1, other keys group 0; later sets win.

    Spans where the columns are known without looking at tensors (no padding), so that vendor
    kernels can serve them.
    """
    mask, n = call.mask, call.n_keys
    if mask.starts is None and all(map(known, sets)):
        cut = [
            (min(max(a - mask.k_start, 0), n), min(max(b - mask.k_start, 0), n), group)
            for group, keys in enumerate(sets, 1)
            for a, b in spans_of(keys)
        ]
        spans = tuple(span for span in cut if span[0] < span[1])
        return dict(spans=spans or ((0, 0, 0),))
    labels = torch.zeros(call.batch, n, dtype=torch.int64, device=call.value.device)
    for group, keys in enumerate(sets, 1):
        labels = torch.where(member(call, keys), group, labels)
    return dict(labels=labels[:, None])  # (batch, 1, keys)


def _from_start(call: AttentionCall, slots: torch.Tensor) -> torch.Tensor:
    starts = call.mask.starts
    return slots[None] if starts is None else slots[None] - starts.to(slots.device)[:, None]
