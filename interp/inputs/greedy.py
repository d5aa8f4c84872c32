"""Greedy decoding step by step, each step open to whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from interp.inputs.chunks import prefill
from interp.inputs.forward import forward
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp_hooks.protocol import Model


@torch.no_grad()
def greedy(
    model: Model,
    ids: torch.Tensor,
    steps: int,
    stop: Collection[int] = (),
    step: Callable[[], AbstractContextManager[Any]] = nullcontext,
    chunk: int | None = None,
) -> list[int]:
    """The tokens that follow a prompt greedily: at most `steps`, none after one of `stop`.

    The prompt but its last token is prefilled; `step()` is entered around every forward that gives
    a token. Models without a cache read everything again each time.

    Args:
        model: the model.
        ids: (1, tokens).
        steps: tokens at most.
        stop: tokens that end it; the one met is the last returned.
        step: makes the context of each step.
        chunk: how many tokens of the prompt are read at a time; None for all.

    Example:
        >>> from interp.inputs.greedy import greedy
        >>> len(greedy(model, torch.arange(8)[None], steps=3))
        3
    """
    said: list[int] = []
    cache: dict[str, Any] = {}
    if model.has_cache:
        out = prefill(model, ids[:, :-1], chunk=chunk)
        cache, ids = dict(past_key_values=out.past_key_values, use_cache=True), ids[:, -1:]
    for _ in range(steps):
        with step():
            out = forward(model, ids, keep=1, **cache)
        token = logits_of(out)[:, -1].argmax(-1, keepdim=True).cpu()
        said.append(int(token))
        if said[-1] in stop:
            break
        ids = token if cache else torch.cat([ids, token], 1)
    return said
