"""The heads of a model as rows of a frame, and the numbers of a file laid on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.results.frame import KEYS, rows_of
from interp.results.head_table import HeadTable
from interp.results.interchange.entries import LIMIT, Cell, Entries

if TYPE_CHECKING:
    from interp_hooks.protocol import Model

#: the kv head of a row where nothing says it
UNKNOWN = -1


def rows_for(model: Model | HeadTable | Sequence[int], tower: str | None = None) -> pd.DataFrame:
    """A row a head of the attentions that a file can be of: self-attention in one tower.

    Args:
        model: a loaded model, a table of its heads, or its (layers, heads) or (layers, heads,
            key/value heads).
        tower: which tower; None for the only one, or the language model's.

    Raises:
        InputError: sizes that no model has, or a tower that is not there.
    """
    if isinstance(model, HeadTable):
        rows = model.frame[list(KEYS)]
    elif hasattr(model, "sites"):
        rows = rows_of(model.sites)
    else:
        rows = _of_sizes(model)  # type: ignore[arg-type]
    rows = rows[rows["kind"] == "self"]
    towers = list(dict.fromkeys(rows["tower"]))
    if tower is None:
        tower = next(
            (t for t in ("", "text") if t in towers), towers[0] if len(towers) == 1 else None
        )
    if tower not in towers:
        raise InputError(
            f"Say which tower the file is of with tower=: {', '.join(map(repr, towers))}."
        )
    return rows[rows["tower"] == tower].reset_index(drop=True)


def _of_sizes(sizes: Sequence[int]) -> pd.DataFrame:
    whole = (
        isinstance(sizes, list | tuple)
        and len(sizes) in (2, 3)
        and all(isinstance(n, int) and 0 < n <= LIMIT for n in sizes)
    )
    if not whole or sizes[1] % sizes[-1]:
        raise InputError(
            f"A model is given itself, as an atlas, or as (layers, heads) or (layers, heads, "
            f"key/value heads), not as {sizes!r}."
        )
    layers, heads, kv_heads = sizes[0], sizes[1], sizes[-1]
    group = heads // kv_heads if len(sizes) == 3 else 0
    rows = [
        ("", "self", n, h, h // group if group else UNKNOWN)
        for n in range(layers)
        for h in range(heads)
    ]
    return pd.DataFrame(rows, columns=list(KEYS))


def unknown_rows(entries: Entries) -> pd.DataFrame:
    """Rows of the smallest grid that holds the file's heads, for a model of unknown size.

    Of a file of key/value heads, each has one row, whose head is not one of the model's.
    """
    layers, heads = entries.box
    kv = entries.grain == "kv_head"
    rows = [("", "self", n, h, h if kv else UNKNOWN) for n in range(layers) for h in range(heads)]
    return pd.DataFrame(rows, columns=list(KEYS))


def laid(entries: Entries, rows: pd.DataFrame, name: str) -> np.ndarray:
    """(rows,): the number of each row's head, or of its key/value head; NaN where the file has
    none, 0 in a list.

    Raises:
        InputError: the file is of a model of another size.
    """
    column = "kv_head" if entries.grain == "kv_head" else "head"
    if column == "kv_head" and (rows["kv_head"] == UNKNOWN).any():
        raise InputError(
            f"{name} is of key/value heads, and nothing says how many of them the model has; give "
            "it as (layers, heads, key/value heads)."
        )
    cells: list[Cell] = list(zip(rows["layer"].tolist(), rows[column].tolist(), strict=True))
    _check_sizes(entries, set(cells), name)
    rest = 0.0 if entries.listed else np.nan
    return np.array([entries.values.get(place, rest) for place in cells], dtype=np.float64)


def _check_sizes(entries: Entries, there: set[Cell], name: str) -> None:
    noun = "key/value heads" if entries.grain == "kv_head" else "heads"
    mine = max(n for n, _ in there) + 1, max(h for _, h in there) + 1
    size = f"{mine[0]} layers of {mine[1]} {noun}"
    beyond = sorted(set(entries.values) - there)
    if beyond:
        raise InputError(
            f"{name} is of another model: it has {noun[:-1]} {beyond[0][0]}-{beyond[0][1]} (its "
            f"grid is {entries.box[0]} × {entries.box[1]}), and there are {size}."
        )
    short = entries.complete and set(entries.values) != there
    if short or (not entries.sparse and entries.box != mine and entries.box > (1, 1)):
        raise InputError(
            f"{name} is of another model: it holds {entries.box[0]} layers of {entries.box[1]} "
            f"{noun}, and there are {size}."
        )


def grain_of(entries: Entries, rows: pd.DataFrame, name: str) -> str:
    """The grain of a table of numbers that does not say it: by its width. Raises `InputError`."""
    width = entries.box[1]
    heads, kv_heads = int(rows["head"].max()) + 1, int(rows["kv_head"].max()) + 1
    if width == heads:
        return "head"
    if width == kv_heads:
        return "kv_head"
    raise InputError(
        f"{name} has {width} columns, and the model {heads} heads"
        + (f" and {kv_heads} key/value heads." if kv_heads else ".")
    )
