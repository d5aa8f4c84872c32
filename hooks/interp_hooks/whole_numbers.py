"""Whole numbers as people give them: Python's, numpy's, a tensor's."""

from __future__ import annotations

import operator
from typing import Any


def whole(value: Any) -> int | None:
    """An int of a whole number of any kind; None for anything else, True and 2.0 among them.

    Example:
        >>> from interp_hooks.whole_numbers import whole
        >>> whole(torch.tensor(5)), whole(5.0), whole(True)
        (5, None, None)
    """
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:  # also a tensor or an array of several numbers
        return None


def quoted(value: Any) -> str:
    """A value as a sentence quotes it, not too long.

    Example:
        >>> from interp_hooks.whole_numbers import quoted
        >>> quoted("L1"), quoted(None)
        ("'L1'", 'None')
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}…"
