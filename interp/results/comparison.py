"""How far two atlases agree: rank correlation and shared strongest heads, score by score."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.results import starting_tokens
from interp.results.places import column as column_of
from interp.support.statistics import spearman

if TYPE_CHECKING:
    from interp.results.head_table import HeadTable

_PLACE = ["tower", "kind", "layer", "head"]


def compare(one: HeadTable, other: HeadTable) -> pd.DataFrame:
    """How far two atlases agree, a row a shared score.

    Columns: `score`; `spearman`, the rank correlation over heads (Pearson's r of ranks, ties
    averaged), None where it is not defined; `heads` measured in both (key/value heads or layers, of
    a score that belongs to them); `top10_overlap`, the share of
    the ten strongest heads (fewer where there are fewer) that both name; `remark`, why a number is
    missing. Where the two were measured on different inputs, one behind a tokenizer that adds a BOS
    and one behind one that does not, say, ``frame.attrs["inputs"]`` is the sentence that says it.

    Raises:
        InputError: the atlases are of models of different shapes, or share no score.
    """
    mine, theirs = one.frame.set_index(_PLACE), other.frame.set_index(_PLACE)
    if set(mine.index) != set(theirs.index):
        raise InputError(
            f"Only atlases of models of one shape can be compared: {one.model} has "
            f"{one.shape_text()}, "
            f"{other.model} has {other.shape_text()}."
        )
    shared = [s for s in one.scores if s in other.scores]
    if not shared:
        raise InputError(
            f"The two atlases share no score: one has {', '.join(one.scores) or 'none'}, the other "
            f"{', '.join(other.scores) or 'none'}."
        )
    rows: list[dict[str, object]] = []
    for score in shared:
        a, b = _shared(mine, theirs, one.about(score).grain, score)
        both = np.isfinite(a) & np.isfinite(b)
        rank = spearman(a[both], b[both])
        k = min(10, int(both.sum()))
        overlap = len(_strongest(a, both, k) & _strongest(b, both, k)) / k if k else None
        rows.append(
            {
                "score": score,
                "spearman": None if math.isnan(rank) else rank,
                "heads": int(both.sum()),
                "top10_overlap": overlap,
                "remark": _remark(a[both], b[both]),
            }
        )
    table = pd.DataFrame(rows)
    for column in ("spearman", "top10_overlap"):
        table[column] = pd.Series([row[column] for row in rows], dtype=object)
    if different := starting_tokens.difference(one.provenance, other.provenance):
        table.attrs["inputs"] = different
    return table


def _shared(
    mine: pd.DataFrame, theirs: pd.DataFrame, grain: str, score: str
) -> tuple[np.ndarray, np.ndarray]:
    """Both columns of a score, a value a place."""
    within = [c for c in (column_of(grain),) if c is not None]
    pair = mine[["kv_head", score]].join(theirs[[score]], rsuffix="_other").reset_index()
    rows = pair.drop_duplicates(["tower", "kind", "layer", *within])
    return rows[score].to_numpy(), rows[f"{score}_other"].to_numpy()


def _remark(a: np.ndarray, b: np.ndarray) -> str:
    """Why there is no rank correlation; nothing where there is one."""
    if len(a) < 2:
        return "measured in fewer than two heads of both"
    flat = [name for name, values in (("first", a), ("second", b)) if np.ptp(values) == 0]
    return f"the same for all heads in the {' and the '.join(flat)}" if flat else ""


def _strongest(values: np.ndarray, allowed: np.ndarray, k: int) -> set[int]:
    order = np.argsort(np.where(allowed, -values, np.inf), kind="stable")
    return set(order[:k].tolist())
