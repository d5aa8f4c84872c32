"""A method of one model, replaced for the length of a block."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch

#: what stands for no value of the model's own
_MISSING = object()


class _Wrapped:
    """A method of `part` that is replaced; a copy of the model has its own, as it was."""

    def __init__(
        self, part: torch.nn.Module, name: str, function: Callable[..., Any], before: Any
    ) -> None:
        self._part, self._name, self._function, self._before = part, name, function, before
        update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        if self._before is not _MISSING:
            return copy.deepcopy(self._before, memo)
        own = inspect.getattr_static(type(self._part), self._name)
        return own.__get__(memo.get(id(self._part), self._part), type(self._part))


@contextmanager
def wrapped(part: torch.nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """`part.name` is `function` in this block, and then what it was."""
    held = part.__dict__
    before = held.get(name, _MISSING)
    value = held[name] = _Wrapped(part, name, function, before)
    try:
        yield
    finally:
        if held.get(name) is value:
            if before is _MISSING:
                del held[name]
            else:
                held[name] = before
