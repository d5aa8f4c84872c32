"""The unit of everything: one query head, and how people write it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from interp_hooks.errors import HeadError

_SPELLINGS = re.compile(
    r"(?:(?P<tower>[A-Za-z_]+)\.)?[LlAa]?(?P<layer>\d+)(?:\.[Hh]?|[Hh]|-)(?P<head>\d+)"
)


@dataclass(frozen=True, order=True)
class Head:
    """Query head `head` of layer `layer` (both from 0) in `tower` ("" where there is only one).

    Prints ``L5H1``; `Head.parse` reads "L5H1", "5.1", "5-1", "a5.h1", (5, 1) and "vision.L5H1".

    Example:
        >>> Head.parse("5.1"), Head.parse("vision.L5H1").tower
        (L5H1, 'vision')
    """

    layer: int
    head: int
    tower: str = ""

    def __str__(self) -> str:
        return f"{self.tower + '.' if self.tower else ''}L{self.layer}H{self.head}"

    __repr__ = __str__  # lists of heads are read more often than anything else here

    @staticmethod
    def parse(written: str | Sequence[int] | Head) -> Head:
        """Read a head. Raises `HeadError` when it is not one of the spellings above."""
        if isinstance(written, Head):
            return written
        if isinstance(written, str):
            match = _SPELLINGS.fullmatch(written.strip())
            if match:
                return Head(int(match["layer"]), int(match["head"]), match["tower"] or "")
        elif (
            isinstance(written, Sequence)
            and len(written) == 2
            and all(isinstance(n, int) and n >= 0 for n in written)
        ):
            return Head(int(written[0]), int(written[1]))
        raise HeadError(
            f"{written!r} is not a head; write L5H1, 5.1, 5-1, a5.h1 or (5, 1), layer first, from "
            "0."
        )


def parse_heads(written: str | Head | Iterable[str | Sequence[int] | Head]) -> list[Head]:
    """Several heads, from a comma-separated string or any iterable of spellings.

    Args:
        written: the heads; each as `Head.parse` reads it.

    Raises:
        HeadError: one that can't be read.

    Example:
        >>> parse_heads("L5H1, 3.2"), parse_heads([(5, 1)])
        ([L5H1, L3H2], [L5H1])
    """
    if isinstance(written, str):
        written = [part for part in written.split(",") if part.strip()]
    if isinstance(written, Head):
        written = [written]
    return [Head.parse(h) for h in written]


def check_head(head: Head, n_layers: int, n_heads: int, name: str = "This model") -> None:
    """Raise `HeadError` unless the model has `head`."""
    if not (0 <= head.layer < n_layers and 0 <= head.head < n_heads):
        raise HeadError(
            f"{name} has no head {head}: it has {n_layers} layers (0 to {n_layers - 1}) of "
            f"{n_heads} heads "
            f"(0 to {n_heads - 1})."
        )
