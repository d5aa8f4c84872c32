"""Texts that end under TransformerLens' `generate`: what is fed after a stop token is no text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from interp_hooks.call import AttentionCall
from interp_hooks.own_methods import wrapped

NEVER = torch.iinfo(torch.int64).max


class Endings:
    """Follows the texts that `generate` writes in a block.

    TransformerLens feeds the stop token, and stop tokens after it, while other texts of the batch
    go on.
    """

    def __init__(self) -> None:
        self._stops: torch.Tensor | None = None
        self._forwards = 0
        self._ended: torch.Tensor | None = None  # (batch,) bool
        self._slots: torch.Tensor | None = None  # (batch,) from which on rows are no text

    @contextmanager
    def watching(self, module: Any) -> Iterator[None]:
        """`module.generate` tells its stop tokens in this block."""
        own = module.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(own).bind(*args, **kwargs)
            given.apply_defaults()
            outer = self.__dict__.copy()
            self.__init__()  # type: ignore[misc]
            self._stops = _stop_tokens(module, given.arguments)
            try:
                return own(*args, **kwargs)
            finally:
                self.__dict__.update(outer)

        with wrapped(module, "generate", generate):
            yield

    def read(self, ids: torch.Tensor) -> None:
        """Note the ids (batch, tokens) of a forward."""
        self._forwards += 1
        if self._stops is None or self._forwards == 1 or not ids.shape[1]:
            return
        now = torch.isin(ids[:, -1].cpu(), self._stops)
        same = self._ended is not None and len(self._ended) == len(now)
        self._ended = now | self._ended if same else now  # type: ignore[operator]

    def call(self, call: AttentionCall) -> AttentionCall:
        """The call, with rows after a text's end not counted as real."""
        ended, mask = self._ended, call.mask
        if ended is None or len(ended) != call.batch:
            return call
        if self._slots is None or len(self._slots) != call.batch:
            self._slots = torch.full((call.batch,), NEVER)
        here = torch.full_like(self._slots, call.n_keys - 1)
        self._slots = torch.where(ended, torch.minimum(self._slots, here), self._slots)
        slots = torch.arange(call.n_queries) + mask.q_start
        running = (slots < self._slots[:, None]).to(call.value.device)  # (batch, queries)
        rows = running if mask.queries is None else mask.queries & running
        return replace(call, mask=replace(mask, queries=rows))


def _stop_tokens(module: Any, given: dict[str, Any]) -> torch.Tensor | None:
    """The ids that end a text, by what `generate` was given; None where nothing does."""
    if not given.get("stop_at_eos", True):
        return None
    stops = given.get("eos_token_id")
    if stops is None:
        stops = getattr(getattr(module, "tokenizer", None), "eos_token_id", None)
    if stops is None:
        return None
    return torch.as_tensor(stops).reshape(-1).cpu()
