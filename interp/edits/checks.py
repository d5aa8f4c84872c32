"""What the settings of edits are checked for: numbers, whole numbers, lists of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from interp.errors import EditError
from interp_hooks.whole_numbers import quoted, whole


def plain(value: Any) -> Any:
    """A value with numpy's and tensors' numbers as Python's, lists and tuples inside too."""
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    return value


def real(value: Any, what: str) -> int | float:
    """A number as Python has it. Raises `EditError` for anything else, NaN among it."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or math.isnan(number):
        raise EditError(f"{what} is a number, not {quoted(value)}.")
    return number


def count(value: Any, what: str) -> int:
    """A whole number as Python has it. Raises `EditError` for anything else."""
    number = whole(value)
    if number is None:
        raise EditError(f"{what} is a whole number, not {quoted(value)}.")
    return number


def counts(values: Any, what: str) -> tuple[int, ...]:
    """Whole numbers, of one or of several. Raises `EditError` for anything else."""
    numbers: list[int | None] = [whole(values)]
    if numbers[0] is None:
        several = isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping))
        numbers = [whole(v) for v in values] if several else [None]
    if None in numbers:
        raise EditError(f"{what} are whole numbers, like [0, 3], not {quoted(values)}.")
    return tuple(n for n in numbers if n is not None)
