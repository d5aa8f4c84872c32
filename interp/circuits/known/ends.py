"""What the edges of a known circuit connect: heads, and by name the input, MLPs and the output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from interp.errors import InputError
from interp_hooks.heads import Head

if TYPE_CHECKING:
    import pandas as pd

#: a head, or "input", "MLP 3", "output", as the tables of edges name them
End = Head | str
#: sender, receiver, and which of the receiver's inputs: "q", "k" or "v" of a head, else ""
Edge = tuple[End, End, str]

_MLP = re.compile(r"MLP (\d+)")


def parse_end(text: object) -> End:
    """ "L2H3" → a head; "input", "MLP 3" and "output" as they are.

    Raises `HeadError` for what is none of these.
    """
    if isinstance(text, str) and (text in ("input", "output") or _MLP.fullmatch(text)):
        return text
    return text if isinstance(text, Head) else Head.parse(str(text))


def check_edge(edge: Edge, n_layers: int, what: str) -> None:
    """Raises `InputError` where an edge runs backwards, or into a part that its receiver lacks."""
    sender, receiver, part = edge
    for end, never in ((sender, "output"), (receiver, "input")):
        if isinstance(end, Head):
            continue
        found = _MLP.fullmatch(end)
        if end == never or (found is None and end not in ("input", "output")):
            raise InputError(
                f"{what} has an edge from {sender} to {receiver}; edges go from the input, a head "
                'or "MLP 3" to a head, an MLP or the output.'
            )
        if found is not None and int(found[1]) >= n_layers:
            raise InputError(f"{what} has {end} in an edge, and there are {n_layers} layers.")
    if isinstance(receiver, Head):
        if part not in ("q", "k", "v"):
            raise InputError(f"An edge goes into q, k or v of a head, not {part!r}.")
    elif part:
        raise InputError(f"An edge into {receiver} has no part; write '' for it, not {part!r}.")


def key(edge: Iterable[object]) -> tuple[str, str, str]:
    """An edge as the tables of edges write it."""
    sender, receiver, part = edge
    return str(sender), str(receiver), str(part)


def labels(
    table: pd.DataFrame, inside: Sequence[Edge], left_out: Sequence[Edge], what: str
) -> np.ndarray:
    """(rows,) 1 for edges inside, 0 for others, NaN for those left out, in the table's order.

    Raises `InputError` where the table lacks an edge that is inside.
    """
    rows = [key(row) for row in zip(table.sender, table.receiver, table.kind, strict=True)]
    positive, apart = {key(e) for e in inside}, {key(e) for e in left_out}
    if missing := positive - set(rows):
        one = " → ".join(min(missing)[:2])
        raise InputError(
            f"The edges found lack {len(missing)} of the {len(positive)} in {what} ({one}); give "
            "all edges of a method that scores edges (eap, eap_ig, acdc)."
        )
    values = [np.nan if r in apart else float(r in positive) for r in rows]
    return np.array(values, dtype=np.float64)
