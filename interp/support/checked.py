"""Arguments of the wrong kind, told in one sentence before anything runs."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from interp.errors import InputError
from interp_hooks.whole_numbers import quoted, whole


def whole_number(value: Any, what: str) -> int:
    """A whole number as Python has it, numpy's too. Raises `InputError` for anything else.

    Example:
        >>> from interp.support.checked import whole_number
        >>> whole_number("64", "The context")
        Traceback (most recent call last):
        interp_hooks.errors.InputError: The context is a whole number, like 64, not '64'.
    """
    number = whole(value)
    if number is None:
        raise InputError(f"{what} is a whole number, like 64, not {quoted(value)}.")
    return number


def number(value: Any, what: str) -> float:
    """A number as Python has it, numpy's too. Raises `InputError` for anything else, NaN among
    it."""
    try:
        found = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        found = math.nan
    if math.isnan(found):
        raise InputError(f"{what} is a number, not {quoted(value)}.")
    return found


def path(value: Any, what: str) -> Path:
    """A path of what names one. Raises `InputError` for anything else."""
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(
            f'{what} is given by its path, like "scan" or Path("scan"), not {quoted(value)}.'
        )
    return Path(value)
