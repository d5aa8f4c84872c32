"""The frame of a head table: a row a head, its fixed columns, and what is checked of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from interp.errors import InputError
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp_hooks.call import Site

KEYS = ("tower", "kind", "layer", "head", "kv_head")
_PLACE = ["tower", "kind", "layer", "head"]


def rows_of(sites: Iterable[Site]) -> pd.DataFrame:
    """A row a head of these attentions, with the columns that a frame begins with."""
    rows = [(s.tower, s.kind, s.layer, h, s.kv_head(h)) for s in sites for h in range(s.n_heads)]
    return pd.DataFrame(rows, columns=list(KEYS))


def is_companion(column: str, columns: Sequence[str]) -> bool:
    """Whether a column says how sure another one is."""
    score, _, part = column.rpartition("_")
    return part in ("stderr", "low", "high") and score in columns


def checked(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy in the fixed column order and types, or `InputError`."""
    missing = [k for k in KEYS if k not in frame.columns]
    if missing:
        raise InputError(f"The frame of an atlas lacks the columns {', '.join(missing)}.")
    if frame.empty:
        raise InputError("The frame of an atlas has no rows: no head was scanned.")
    scores = [c for c in frame.columns if c not in KEYS]
    out = frame[[*KEYS, *scores]].reset_index(drop=True).copy()
    try:
        out = out.astype(
            {
                "layer": "int64",
                "head": "int64",
                "kv_head": "int64",
                **dict.fromkeys(scores, "float64"),
            }
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The frame of an atlas must hold whole layers and heads, and numbers: {error}."
        ) from error
    out = out.astype({"tower": "str", "kind": "str"})
    if (out[["layer", "head"]] < 0).any(axis=None):
        raise InputError("Layers and heads of an atlas count from 0; the frame has negative ones.")
    twice = out.duplicated(_PLACE)
    if twice.any():
        row = out[twice].iloc[0]
        raise InputError(
            f"Head {Head(row['layer'], row['head'], row['tower'])} is twice in the frame of the "
            "atlas."
        )
    return out
