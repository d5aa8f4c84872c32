"""A long text read in chunks over one cache, so that no forward holds all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError, ModelError
from interp.inputs.forward import forward
from interp.inputs.host_cache import host_cache
from interp_hooks.huggingface.context import grows_with_length
from interp_hooks.joined_stats import JoinedStats
from interp_hooks.question import Question

if TYPE_CHECKING:
    from interp_hooks.protocol import Model
    from interp_hooks.recording import LayerStats

#: Fewer tokens a chunk are nearly as many forwards as tokens.
LEAST = 16
#: Largest difference of a statistic in chunks from the same at once, by the width of the numbers.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
#: The same in 16 bits, and where weights are quantised.
COARSE = 0.1
#: Tokens of the text on which chunks are held against the whole.
TRIED = 64


def prefill(
    model: Model, ids: torch.Tensor, mask: torch.Tensor | None = None, chunk: int | None = None
) -> Any:
    """What the forward of the last chunk returns, its cache included: as one forward of all.

    Where a GPU has no room for the keys and values of all layers, they wait in the host's memory
    (`host_cache`).

    Args:
        model: the model.
        ids, mask: (batch, tokens).
        chunk: tokens at a time; None for all at once.

    Example:
        >>> from interp.inputs.chunks import prefill
        >>> prefill(model, torch.arange(40)[None], chunk=16).logits.shape[:2]
        torch.Size([1, 1])
    """
    length = ids.shape[1]
    cache: dict[str, Any] = {}
    if chunk is not None and chunk < length:
        away = host_cache(model, *ids.shape)
        cache = {} if away is None else dict(past_key_values=away)
    for a in range(0, length, chunk or length):
        b = min(a + (chunk or length), length)
        seen = None if mask is None else mask[:, :b]
        out = forward(model, ids[:, a:b], seen, keep=1, use_cache=True, **cache)
        cache = dict(past_key_values=out.past_key_values)
        if cache["past_key_values"] is None:
            raise ModelError(f"{model.name} returned no cache, so it can't read a text in chunks.")
    return out


def watched(
    model: Any,
    question: Question,
    callback: Callable[[LayerStats], None],
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    chunk: int | None = None,
) -> Any:
    """Reads a text under a question and hands each layer's statistics to `callback`: as they come,
    or, in chunks, each layer's of all chunks at the end.

    Args:
        model: the model.
        question, callback: as `model.watch` takes them.
        ids, mask: (batch, tokens).
        chunk: tokens at a time; None, or as many as there are, for one forward.

    Returns:
        What the last forward returns.

    Raises:
        TapError: the question asks for calls or weights themselves, in chunks.

    Example:
        >>> from interp_hooks import Question
        >>> from interp.inputs.chunks import watched
        >>> layers = []
        >>> question = Question(frozenset({"max"}))
        >>> _ = watched(model, question, layers.append, torch.arange(40)[None], chunk=16)
        >>> layers[2].max.shape
        torch.Size([1, 8, 40])
    """
    if chunk is None or ids.shape[1] <= chunk:
        with model.watch(question, callback):
            return forward(model, ids, mask, keep=1)
    joined = JoinedStats(question, ids.shape[1])
    with model.watch(question, joined.add):
        out = prefill(model, ids, mask, chunk)
    for stats in joined:
        callback(stats)
    return out


def check_chunks(model: Any, chunk: int, ids: torch.Tensor, length: int) -> None:
    """Refuses chunks that would give other numbers than the whole text.

    Args:
        model: the model.
        chunk: tokens at a time.
        ids: (1, tokens) of a text, of which the first are tried both ways.
        length: tokens of the longest text to come.

    Raises:
        InputError: chunks of fewer than 16 tokens.
        ModelError: the model keeps no cache, its positions depend on how long the text at hand is,
            or its attention over a cache is another.

    Example:
        >>> from interp.inputs.chunks import check_chunks
        >>> check_chunks(model, 16, torch.arange(40)[None], 1024)
    """
    if chunk < LEAST:
        raise InputError(f"A chunk of {chunk} tokens is too short; take {LEAST} at least.")
    if not model.has_cache:
        raise ModelError(
            f"{model.name} keeps no cache of its keys, so a text can't be read in chunks; leave "
            "chunk= (--chunk) out."
        )
    kind = grows_with_length(getattr(model.module, "config", None), length)
    if kind:
        raise ModelError(
            f"The rotary positions of {model.name} depend on how long the text at hand is "
            f"({kind}), so that chunks would be another text; leave chunk= (--chunk) out."
        )
    ids = ids[:1, :TRIED]
    asked = Question(frozenset({"max", "entropy", "distance"}))
    found: list[list[LayerStats]] = [[], []]
    with torch.no_grad():
        for layers, size in zip(found, (None, max(1, ids.shape[1] // 3)), strict=True):
            watched(model, asked, layers.append, ids, None, size)
    if len(found[0]) != len(found[1]):
        raise ModelError(_otherwise(model))
    exact = not getattr(model.module, "is_quantized", False)
    most = TOLERANCE.get(next(model.module.parameters()).dtype, COARSE) if exact else COARSE
    for whole, parts in zip(*found, strict=True):
        for name, value in whole.rows.items():
            scale = value.abs().mean().clamp_min(1e-6)
            other = parts.rows[name]
            if other.shape != value.shape or bool((other - value).abs().mean() > most * scale):
                raise ModelError(_otherwise(model))


def _otherwise(model: Any) -> str:
    return (
        f"{model.name} attends otherwise in chunks than to a whole text (tried on {TRIED} tokens), "
        "so its scores would be other ones; leave chunk= (--chunk) out."
    )
