"""What an edit may ask of the model it is bound to; `HookedModel` is one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from interp_hooks.call import Site
from interp_hooks.heads import Head
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class Model(Protocol):
    """A model with heads, as edits and helpers below `HookedModel` see it."""

    name: str
    tokenizer: Any

    @property
    def module(self) -> Any: ...

    @property
    def backend(self) -> str: ...

    @property
    def sites(self) -> list[Site]: ...

    @property
    def main_tower(self) -> str: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def n_heads(self) -> int: ...

    @property
    def n_kv_heads(self) -> int: ...

    @property
    def max_context(self) -> int | None: ...

    @property
    def accepts(self) -> frozenset[str]: ...

    @property
    def has_cache(self) -> bool: ...

    @property
    def gives_caches(self) -> bool: ...

    @property
    def position_table(self) -> str | None: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, *args: Any, **inputs: Any) -> Any: ...

    def check(self, head: Head) -> Head: ...

    def clean(self) -> AbstractContextManager[None]: ...

    def watch(
        self, question: Question, callback: Callable[[LayerStats], None], stage: str = "before"
    ) -> AbstractContextManager[None]: ...
