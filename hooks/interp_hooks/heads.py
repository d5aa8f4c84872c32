"""The unit of everything: one query head, and how people write it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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
    """Raise `HeadError` unless `head` is one of a grid of layers × heads."""
    if not (0 <= head.layer < n_layers and 0 <= head.head < n_heads):
        raise HeadError(
            f"{name} has no head {head}: it has {n_layers} layers (0 to {n_layers - 1}) of "
            f"{n_heads} heads "
            f"(0 to {n_heads - 1})."
        )


def check_layer_head(head: Head, sizes: Mapping[int, int], name: str = "This model") -> None:
    """Raise `HeadError` unless a model has `head`.

    Args:
        sizes: layer → heads, of the layers that have attention.
    """
    if 0 <= head.head < sizes.get(head.layer, 0):
        return
    counts = sorted(set(sizes.values()))
    if sorted(sizes) == list(range(len(sizes))) and len(counts) == 1:
        check_head(head, len(sizes), counts[0], name)
    if head.layer in sizes:
        n = sizes[head.layer]
        raise HeadError(
            f"{name} has no head {head}: layer {head.layer} has {n} heads (0 to {n - 1})."
        )
    raise HeadError(f"{name} has no head {head}: {no_attention(head.layer, sizes)}.")


def no_attention(layer: int, layers: Iterable[int]) -> str:
    """ "layer 0 has no attention; layers 1 and 3 have": for sentences about a layer."""
    numbers = sorted(layers)
    if numbers == list(range(len(numbers))):
        return f"there is no attention layer {layer}; there are 0 to {len(numbers) - 1}"
    inside = 0 <= layer < max(numbers)
    begins = f"layer {layer} has no attention" if inside else f"there is no attention layer {layer}"
    return f"{begins}; {layer_list(numbers)} {'have' if len(numbers) > 1 else 'has'}"


def layer_list(layers: Iterable[int]) -> str:
    """Layers as a sentence names them.

    Example:
        >>> layer_list([1, 3, 5, 6, 7]), layer_list([2])
        ('layers 1, 3 and 5 to 7', 'layer 2')
    """
    numbers = sorted(layers)
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    parts = [
        part
        for run in runs
        for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(n) for n in run])
    ]
    if len(numbers) == 1:
        return f"layer {parts[0]}"
    return "layers " + (" and ".join([", ".join(parts[:-1]), parts[-1]]) if parts[1:] else parts[0])
