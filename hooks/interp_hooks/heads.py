"""The unit of everything: one query head, and how people write it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp_hooks.errors import HeadError
from interp_hooks.whole_numbers import quoted, whole

_SPELLINGS = re.compile(
    r"(?:(?P<tower>[A-Za-z_]+)\.)?[LlAa]?(?P<layer>\d+)(?:\.[Hh]?|[Hh]|-)(?P<head>\d+)"
)
#: a key/value head or a layer, as results write them
_WIDER = re.compile(r"(?:[A-Za-z_]+\.)?L\d+(?:KV\d+)?")


#: what names a head of cross-attention in place of a tower: cross.L1H2
CROSS = "cross"


@dataclass(frozen=True, order=True)
class Head:
    """Query head `head` of layer `layer` (both from 0) in `tower` ("" where there is only one).

    Prints ``L5H1``. `Head(5, 1)`, `Head("L5H1")` and `Head.parse` read the same: "L5H1", "5.1",
    "5-1", "a5.h1", (5, 1) and "vision.L5H1"; numbers may be numpy's or a tensor's.

    A head equals its own text ("L5H1", no other spelling) and, without a tower, its pair (5, 1), so
    that it is found in lists of either. It hashes as the pair: sets and dictionaries take heads and
    pairs for one another, but not texts, which hash differently; `parse_heads` makes heads of those
    first.

    Args:
        layer: from 0, or a head in any spelling, alone.
        head: from 0.
        tower: its name.

    Raises:
        HeadError: what is no head in any spelling, or a number that is not whole.

    Example:
        >>> Head("L5H1") == Head(5, 1) == (5, 1), Head.parse("vision.L5H1").tower
        (True, 'vision')
        >>> "L5H1" in [Head(5, 1)], {Head(5, 1): 0.5}[5, 1]
        (True, 0.5)
    """

    layer: int
    head: int = None  # type: ignore[assignment]  # a number once it is made
    tower: str = ""

    if TYPE_CHECKING:

        def __init__(self, layer: Any, head: Any = None, tower: str = "") -> None: ...

    def __post_init__(self) -> None:
        layer, head, tower = self.layer, self.head, self.tower
        if type(layer) is int and type(head) is int and type(tower) is str:
            return
        if head is None:
            read = Head.parse(layer)
            if tower and read.tower not in ("", tower):
                raise HeadError(f"{layer!r} is of the tower {read.tower}, not of {tower}.")
            layer, head, tower = read.layer, read.head, tower or read.tower
        if not isinstance(tower, str):
            raise HeadError(f'A head\'s tower is a name, like "vision", not {quoted(tower)}.')
        object.__setattr__(self, "layer", _whole(layer, "layer"))
        object.__setattr__(self, "head", _whole(head, "number"))
        object.__setattr__(self, "tower", tower)

    def __str__(self) -> str:
        return f"{self.tower + '.' if self.tower else ''}L{self.layer}H{self.head}"

    __repr__ = __str__  # lists of heads are read more often than anything else here

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Head):
            return (self.layer, self.head, self.tower) == (other.layer, other.head, other.tower)
        if isinstance(other, str):
            return str(self) == other
        if isinstance(other, tuple):
            return not self.tower and (self.layer, self.head) == other
        return NotImplemented

    def __hash__(self) -> int:
        # as the pair that it may equal; of numbers alone, so that the order of a set of heads is
        # the same in every run
        return hash((self.layer, self.head))

    @staticmethod
    def parse(written: Any) -> Head:
        """Read a head. Raises `HeadError` when it is not one of the spellings above."""
        if isinstance(written, Head):
            return written
        if isinstance(written, str):
            match = _SPELLINGS.fullmatch(written.strip())
            if match:
                return Head(int(match["layer"]), int(match["head"]), match["tower"] or "")
        elif (pair := _pair(written)) is not None:
            return Head(*pair)
        if _WIDER.fullmatch(str(written)):
            raise HeadError(
                f"{written} is no single query head; atlas.heads_at({str(written)!r}) gives the "
                "heads of a layer or a key/value head."
            )
        raise HeadError(
            f"{quoted(written)} is not a head; write L5H1, 5.1, 5-1, a5.h1 or (5, 1), layer first, "
            "from 0."
        )


def _whole(value: Any, what: str) -> int:
    """A whole number of any kind as an int. Raises `HeadError`."""
    number = whole(value)
    if number is None:
        raise HeadError(
            f"A head's {what} is a whole number, not {quoted(value)}; write Head(5, 1) or "
            'Head("L5H1"), layer first, from 0.'
        )
    return number


def _pair(written: Any) -> tuple[int, int] | None:
    """(layer, head) of a pair of whole numbers, 0 or more; None for anything else."""
    if isinstance(written, (str, bytes, Mapping, set, frozenset)):
        return None
    try:
        layer, head = (whole(n) for n in written) if len(written) == 2 else (None, None)
    except TypeError:  # no sequence
        return None
    if layer is None or head is None or min(layer, head) < 0:
        return None
    return layer, head


def parse_heads(written: Any) -> list[Head]:
    """Several heads, from a comma-separated string or any iterable of spellings.

    Args:
        written: the heads, each as `Head.parse` reads it: "L5H1, 3.2", a list, an array with a row
            a head, what `atlas.top(…)` gives; or a single one, a pair of numbers too.

    Raises:
        HeadError: one that can't be read, or what is no list of heads.

    Example:
        >>> parse_heads("L5H1, 3.2"), parse_heads([(5, 1)]), parse_heads((5, 1))
        ([L5H1, L3H2], [L5H1], [L5H1])
    """
    if isinstance(written, str):
        written = [part for part in written.split(",") if part.strip()]
    elif isinstance(written, Head):
        return [written]
    elif (pair := _pair(written)) is not None:
        return [Head(*pair)]
    if isinstance(written, (Mapping, bytes)) or not isinstance(written, Iterable):
        if _WIDER.fullmatch(str(written)):
            Head.parse(written)  # tells of layers and key/value heads
        raise HeadError(
            f'Heads are written like "L5H1,L3H2" or ["L5H1", (3, 2)], not {quoted(written)}.'
        )
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
