"""A method of one model, replaced for the length of a block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch


class _Wrapped:
    """A method of `part` that is replaced; a copy of the model has its own, as it was."""

    def __init__(self, part: torch.nn.Module, name: str, function: Callable[..., Any]) -> None:
        self._part, self._name, self._function = part, name, function
        update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        own = inspect.getattr_static(type(self._part), self._name)
        return own.__get__(memo.get(id(self._part), self._part), type(self._part))


@contextmanager
def wrapped(part: torch.nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """`part.name` is `function` in this block, and then what it was."""
    held, missing = part.__dict__, object()
    before, value = held.get(name, missing), _Wrapped(part, name, function)
    held[name] = value
    try:
        yield
    finally:
        if held.get(name) is value:
            if before is missing:
                del held[name]
            else:
                held[name] = before
