"""How far two head tables agree: rank correlations and shared strongest heads, score by score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.results import starting_tokens
from interp.results.places import column as column_of
from interp.results.places import noun
from interp.support.rank_agreement import agreement

if TYPE_CHECKING:
    from interp.results.head_table import HeadTable

_PLACE = ["tower", "kind", "layer", "head"]


def compare(
    one: HeadTable,
    other: HeadTable,
    pairs: list[tuple[str, str]] | None = None,
    k: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """How far two tables agree, a row a shared score.

    Columns: `score`; `spearman`, the rank correlation over heads (Pearson's r of ranks, ties
    averaged), with `spearman_low`, `spearman_high`, a 95 % bootstrap interval, and `spearman_p`, of
    as large a |ρ| when heads are shuffled; `kendall`, τ_b, with its interval; `heads` measured in
    both (key/value heads or layers, of a score that belongs to them); `k` and `top<k>_overlap`, the
    share of the k strongest heads (fewer where there are fewer) that both name, with
    `overlap_low` and `overlap_high`, `overlap_expected` of as many random heads, and `overlap_p`,
    of as large an overlap by chance; `interval_over`, what was resampled, "heads" or "samples";
    `remark`, why a number is missing, or what to mind. A number that is not defined is None. Where
    the two were measured on different inputs, one behind a tokenizer that adds a BOS and one behind
    one that does not, say, ``frame.attrs["inputs"]`` is the sentence that says it.

    Args:
        one, other: tables of models of one shape.
        pairs: the scores that are held against each other; None for those of one name.
        k: how many strongest heads. Where one side is a list of heads, as many as it names.
        seed: of the resamples.

    Raises:
        InputError: the tables are of models of different shapes, or share no score; k is no number
            of heads.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"The number of strongest heads is at least 1, not {k!r}.")
    mine, theirs = one.frame.set_index(_PLACE), other.frame.set_index(_PLACE)
    if set(mine.index) != set(theirs.index):
        raise InputError(
            f"Only atlases of models of one shape can be compared: {one.model} has "
            f"{one.shape_text()}, "
            f"{other.model} has {other.shape_text()}."
        )
    if pairs is None:
        pairs = [(s, s) for s in one.scores if s in other.scores]
    if not pairs:
        raise InputError(
            f"The two atlases share no score: one has {', '.join(one.scores) or 'none'}, the other "
            f"{', '.join(other.scores) or 'none'}."
        )
    rows = [_row(one, other, mine, theirs, pair, k, seed) for pair in pairs]
    table = pd.DataFrame(rows)
    for column in table.columns:
        if column not in ("score", "heads", "k", "interval_over", "remark"):
            table[column] = pd.Series([row[column] for row in rows], dtype=object)
    if different := starting_tokens.difference(one.provenance, other.provenance):
        table.attrs["inputs"] = different
    return table


def _row(
    one: HeadTable,
    other: HeadTable,
    mine: pd.DataFrame,
    theirs: pd.DataFrame,
    pair: tuple[str, str],
    k: int,
    seed: int,
) -> dict[str, Any]:
    first, second = pair
    grain = one.about(first).grain
    if other.about(second).grain != grain:
        raise InputError(
            f"{first} is a score of {noun(grain, True)} and {second} one of "
            f"{noun(other.about(second).grain, True)}; say how a group of query heads becomes one "
            'with group="mean" or "max" (--group).'
        )
    shared = _shared(mine, theirs, grain, pair)
    both = shared[np.isfinite(shared["a"]) & np.isfinite(shared["b"])]
    a, b = both["a"].to_numpy(), both["b"].to_numpy()
    listed = [v for v, table in ((a, one), (b, other)) if _is_list(table)]
    k_row = max(1, int(listed[0].sum())) if listed else k
    samples = (_samples(one, first, grain, both), _samples(other, second, grain, both))
    found = agreement(a, b, k_row, samples, seed)
    over = "samples" if any(s is not None for s in samples) else "heads"
    return {
        "score": first if first == second else f"{first} ~ {second}",
        "spearman": found.spearman,
        "spearman_low": found.spearman_interval[0],
        "spearman_high": found.spearman_interval[1],
        "spearman_p": found.spearman_p,
        "kendall": found.kendall,
        "kendall_low": found.kendall_interval[0],
        "kendall_high": found.kendall_interval[1],
        "heads": found.n,
        "k": found.k,
        f"top{k}_overlap": found.overlap,
        "overlap_low": found.overlap_interval[0],
        "overlap_high": found.overlap_interval[1],
        "overlap_expected": found.expected,
        "overlap_p": found.overlap_p,
        "interval_over": over,
        "remark": "; ".join(_remarks(a, b, found.k, len(shared))),
    }


def _is_list(table: HeadTable) -> bool:
    """Whether a table is a list of heads, 1 for those named and 0 for the others."""
    said = table.provenance.get("interchange")
    return isinstance(said, dict) and bool(said.get("listed"))


def _shared(
    mine: pd.DataFrame, theirs: pd.DataFrame, grain: str, pair: tuple[str, str]
) -> pd.DataFrame:
    """Both columns as `a` and `b` with their places, a row a place of the grain."""
    within = [c for c in (column_of(grain),) if c is not None]
    first, second = mine[["kv_head"]].assign(a=mine[pair[0]]), theirs[[pair[1]]]
    joined = first.join(second.set_axis(["b"], axis=1)).reset_index()
    ordered = joined.sort_values(_PLACE, kind="stable")  # so that ties are broken as `top` does
    return ordered.drop_duplicates(["tower", "kind", "layer", *within])


def _samples(
    table: HeadTable, score: str, grain: str, rows: pd.DataFrame
) -> list[tuple[float, ...]] | None:
    """The numbers in each sample of each row's place, in order; None where a table has none."""
    held = table.samples.get(score)
    within = column_of(grain)
    if not held or within is None or len(rows) == 0:
        return None
    found = [held.get(place, ()) for place in zip(rows["layer"], rows[within], strict=True)]
    # one sample a head says nothing of how far another would be from it
    return found if min(map(len, found)) > 1 else None


def _remarks(a: np.ndarray, b: np.ndarray, k: int, places: int) -> list[str]:
    """Why there is no rank correlation, and what to mind of the numbers."""
    if len(a) < 2:
        return ["measured in fewer than two heads of both"]
    names = (("first", a), ("second", b))
    flat = [name for name, values in names if np.ptp(values) == 0]
    said = [f"the same for all heads in the {' and the '.join(flat)}"] if flat else []
    for name, values in names:
        last = np.sort(values)[::-1][k - 1]
        tied, left = int((values == last).sum()), k - int((values > last).sum())
        if name not in flat and tied > left:
            said.append(
                f"{tied} heads of the {name} tie for the last {left} of its {k} strongest, taken "
                "in order"
            )
    if 2 * len(a) < places:
        said.append(f"of {places} heads only {len(a)} were measured in both")
    return said
