"""Where a tensor's numbers may be looked at, and properties that are computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

import torch

Value = TypeVar("Value")


def may_look(device: torch.device) -> bool:
    """Whether looking at a number costs nothing: on a CPU, which has computed it when asked, and
    outside a graph that is being compiled, which a look would break."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


class lazy(Generic[Value]):
    """A property that is computed once an instance: `functools.cached_property` without the lock
    that it has before Python 3.12, which no compiler of graphs can enter."""

    def __init__(self, make: Callable[[Any], Value]) -> None:
        self.make, self.name, self.__doc__ = make, "", make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> lazy[Value]: ...
    @overload
    def __get__(self, instance: Any, owner: type) -> Value: ...
    def __get__(self, instance: Any, owner: type) -> lazy[Value] | Value:
        if instance is None:
            return self
        value = self.make(instance)
        instance.__dict__[self.name] = value
        return value
