"""Sets of keys that an edit names, in the columns of one attention call, and ranges of its query
rows.

A set is "initial" (each sample's first real token), "image" (the image tokens of the prompt at
hand, in a vision-language model), a span (start, stop) or a list of token positions, counted from
each sample's first real token, a text, Span("the instruction"), that is looked for in each prompt,
or a (batch, slots) bool tensor over the padded sequence. In JSON a span is "2:5", a text
"text:the instruction".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.edits.prompt_text import PromptText
from interp.errors import EditError
from interp_hooks.whole_numbers import quoted, whole

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall
    from interp_hooks.protocol import Model

KeySet = Any  # "initial" | "image" | (start, stop) | Span | [position, …] | tensor

#: what a text begins with in JSON
MARK = "text:"


@dataclass(frozen=True, repr=False)
class Span:
    """Tokens that an edit names: ``Span(start, stop)``, or ``Span("a text")`` of the prompt.

    A text is looked for in each prompt as it is read (a chat's template filled in), in what the
    tokenizer decodes its tokens to; of several places the last counts. It need not begin or end
    with a token: every token that overlaps it belongs to it. What is generated is not searched,
    except in models without a cache, which read everything again at each step.

    Args:
        start, stop: token positions start … stop − 1, counted from each sample's first real token;
            or a text alone.

    Raises:
        EditError: no text, or positions below 0 or in the wrong order; in use, a prompt without
            the text, or one that was read outside the edit's block.

    Example:
        >>> ids = model.tokenizer("the cat saw the dog", return_tensors="pt")["input_ids"]
        >>> def edited(keys):
        ...     with model.edit(interp.edits.ScaleTokens(keys, gain=4.0)):
        ...         return model.logits(ids)
        >>> Span = interp.edits.Span
        >>> bool((edited(Span("saw the")) == edited(Span(3, 5))).all())
        True
    """

    start: int | str
    stop: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.start, str):
            if not self.start or self.stop is not None:
                raise EditError(
                    'A span is a text of the prompt, Span("a text"), or two positions, Span(2, 5), '
                    f"not {self!r}."
                )
            return
        for name in ("start", "stop"):
            object.__setattr__(self, name, position(getattr(self, name)))
        if self.start is None or self.stop is None:
            raise EditError(f"A span of keys is two positions, from 0, or a text, not {self!r}.")
        if self.start > self.stop:
            raise EditError(f"A span of keys ends before it starts: {(self.start, self.stop)}.")

    @property
    def text(self) -> str | None:
        """The text; None for positions."""
        return self.start if isinstance(self.start, str) else None

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}" if self.text is None else f"{MARK}{self.text}"

    def __repr__(self) -> str:
        given = (self.start,) if self.stop is None else (self.start, self.stop)
        return f"Span({', '.join(map(repr, given))})"


def position(value: Any) -> Any:
    """A token's position as an int, from 0; None for what is none."""
    number = whole(value)
    return None if number is None or number < 0 else number


def check(keys: KeySet) -> KeySet:
    """`keys` in its stored form (a word, `Span`, list or tensor). Raises `EditError` if it is none
    of the kinds."""
    if isinstance(keys, torch.Tensor):
        if keys.ndim != 2:
            raise EditError(f"A tensor of keys is (batch, slots), not {tuple(keys.shape)}.")
        return keys.bool()
    if isinstance(keys, (Span, PromptText)):
        return keys
    if isinstance(keys, np.ndarray):
        keys = keys.tolist()
    if isinstance(keys, str):
        if keys in ("initial", "image"):
            return keys
        if keys.startswith(MARK):
            return Span(keys.removeprefix(MARK))
        if written := re.fullmatch(r"(\d+):(\d+)", keys):
            keys = int(written[1]), int(written[2])
    if (
        isinstance(keys, str)
        or not isinstance(keys, Sequence)
        or any(position(k) is None for k in keys)
    ):
        raise EditError(
            'Keys are "initial", "image", a span (start, stop), in JSON "start:stop", a text of '
            'the prompt, Span("…"), in JSON "text:…", a list of positions, or a tensor, '
            f"not {quoted(keys)}."
        )
    numbers = [position(k) for k in keys]
    return Span(*numbers) if isinstance(keys, tuple) and len(keys) == 2 else numbers


def names_text(keys: Any) -> bool:
    """Whether a set, or one of {layer: set}, is a text of the prompt."""
    if isinstance(keys, Mapping):
        return any(map(names_text, keys.values()))
    return isinstance(keys, PromptText) or (isinstance(keys, Span) and keys.text is not None)


def bound(keys: Any, model: Model) -> Any:
    """A text, or texts of {layer: set}, as what finds them in the prompts of `model`; anything else
    as it is. Raises `EditError` for a model without a tokenizer."""
    if isinstance(keys, Mapping):
        return {key: bound(one, model) for key, one in keys.items()}
    if not (isinstance(keys, Span) and keys.text is not None):
        return keys
    if model.tokenizer is None:
        raise EditError(
            f"{model.name} has no tokenizer, so the text {keys.text!r} can't be found in its "
            "prompts; name its positions, Span(start, stop)."
        )
    return PromptText(keys.text, model.tokenizer)


def at_hand(call: AttentionCall, keys: KeySet) -> KeySet:
    """A set without texts: a text as its `Span` of positions where that is the same in all samples
    (so that it goes the way of positions), else as (batch, slots) bool.

    Raises `EditError` where the prompt has no such text.
    """
    if not names_text(keys):
        return keys
    if call.site.kind == "cross":
        raise EditError(
            "A text is looked for in the model's own prompt, and the keys of cross-attention are "
            "another input's; name their positions, Span(start, stop)."
        )
    if not isinstance(keys, PromptText):
        raise EditError(
            f"The text {keys.text!r} needs a tokenizer; the edit's own bind must return one of "
            "self.reading(model)."
        )
    slots = keys.slots(call)
    starts = [0] * len(slots) if call.mask.starts is None else call.mask.starts.tolist()
    if len(starts) == len(slots):
        places = {(a - s, b - s) for (a, b), s in zip(slots, starts, strict=True)}
        if len(places) == 1 and min(place := places.pop()) >= 0:
            return Span(*place)
    width = max(b for _, b in slots)
    marks = torch.zeros(len(slots), width, dtype=torch.bool)
    for row, (a, b) in zip(marks, slots, strict=True):
        row[a:b] = True
    return marks.to(call.value.device)


def spans_of(keys: KeySet) -> list[tuple[int, int]]:
    """Token spans of a set that is known without an input (`known`)."""
    if keys == "initial":
        return [(0, 1)]
    if isinstance(keys, Span):
        assert isinstance(keys.start, int) and keys.stop is not None
        return [(keys.start, keys.stop)]
    spans: list[tuple[int, int]] = []
    for position in sorted(set(keys)):
        if spans and spans[-1][1] == position:
            spans[-1] = spans[-1][0], position + 1
        else:
            spans.append((position, position + 1))
    return spans


def known(keys: KeySet) -> bool:
    """Whether a set's positions are known without an input: no tensor, text, or image."""
    return not isinstance(keys, torch.Tensor) and keys != "image" and not names_text(keys)


def slots_of(call: AttentionCall, keys: KeySet) -> torch.Tensor | None:
    """(batch, slots) bool of a set that is given by slots: a tensor, or the image's tokens at hand;
    None for others. Raises `EditError` where there is no image, or no such text."""
    keys = at_hand(call, keys)
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
        alike = type(one) is type(other) and not isinstance(one, torch.Tensor)
        return alike and bool(one == other)
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
    keys = at_hand(call, keys)
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
    sample's own, repeated. Raises `EditError` for values of other samples."""
    rows = call.rows_of(values)
    if rows is None:
        raise EditError(
            f"A tensor of {what} for {len(values)} samples meets a batch of {call.batch}."
        )
    return rows.to(call.value.device)


def groups(call: AttentionCall, sets: Sequence[KeySet]) -> dict[str, Any]:
    """`spans=` or `labels=` of a `Steer`: set i is group i + 1, other keys group 0; later sets win.

    Spans where the columns are known without looking at tensors (no padding), so that vendor
    kernels can serve them.
    """
    mask, n = call.mask, call.n_keys
    sets = [at_hand(call, keys) for keys in sets]
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
