"""From the numbers of a score file to a head table, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.results.about import About
from interp.results.frame import KEYS
from interp.results.head_table import HeadTable
from interp.results.interchange import grid
from interp.results.interchange.entries import Cell, Entries
from interp.results.places import column as column_of
from interp.results.places import noun

if TYPE_CHECKING:
    from interp_hooks.protocol import Model

#: what a provenance says of the file itself, beside what is said in it
RESERVED = ("format", "file", "grid", "listed", "query_heads")
#: how the query heads of a key/value head become one number
GROUPS = {"mean": np.mean, "max": np.max}


class Arguments(NamedTuple):
    """What a `HeadTable` is made of, and the numbers of each sample."""

    frame: pd.DataFrame
    provenance: dict[str, Any]
    notes: list[str]
    about: dict[str, About]
    samples: dict[str, dict[Cell, tuple[float, ...]]]


def table_of(
    entries: Entries,
    name: str,
    model: Model | HeadTable | Sequence[int] | None = None,
    tower: str | None = None,
    grain: str | None = None,
) -> Arguments:
    """The table that a file's numbers make.

    Args:
        entries: the numbers.
        name: what the file is called.
        model: whose heads they are, see `grid.rows_for`; None for the grid that the file shows.
        tower: of the model.
        grain: "head" or "kv_head", for tables of numbers that don't say it.

    Raises:
        InputError: the file is of a model of another size; the name of its score can't be a
            column.
    """
    rows = grid.unknown_rows(entries) if model is None else grid.rows_for(model, tower)
    notes = list(entries.notes)
    if entries.format == "matrix":
        entries, said = _with_grain(entries, rows, name, grain, model is None)
        notes += said
        if model is None:
            rows = grid.unknown_rows(entries)
    elif grain is not None and grain != entries.grain:
        raise InputError(
            f"{name} is of {noun(entries.grain, True)}, and not of {noun(grain, True)}."
        )
    score = entries.score
    if score in KEYS or not score.strip():
        raise InputError(f"A score can't be called {score!r}; name it with score=.")
    rows = rows.assign(**{score: grid.laid(entries, rows, name)})
    if errors := _standard_errors(entries):
        within = column_of(entries.grain)
        cells = zip(rows["layer"], rows[within], strict=True)
        rows[f"{score}_stderr"] = [errors.get(place, math.nan) for place in cells]
    missing = len(set(zip(rows["layer"], rows[column_of(entries.grain)], strict=True)))
    missing -= len(entries.values)
    if missing and not entries.listed:
        notes.append(f"{name} has no number for {missing} heads; they count as not measured.")
    interchange = {
        "format": entries.format,
        "file": name,
        "grid": "file" if model is None else "model",
        "listed": entries.listed,
        **{k: v for k, v in entries.said.items() if k not in RESERVED},
    }
    if entries.grain == "kv_head" and model is None:
        interchange["query_heads"] = "unknown"
    model_name = _name(model) or entries.said.get("model") or f"the model of {name}"
    lengths = {len(v) for v in entries.samples.values()}
    provenance = {
        "model": model_name,
        "interchange": interchange,
        "measured": {score: {"tokens": None, "samples": max(lengths, default=None)}},
    }
    samples = {score: dict(entries.samples)} if entries.samples else {}
    return Arguments(rows, provenance, notes, _about(entries), samples)


def _with_grain(
    entries: Entries, rows: pd.DataFrame, name: str, grain: str | None, unknown: bool
) -> tuple[Entries, list[str]]:
    if grain not in (None, "head", "kv_head"):
        raise InputError(f"The grain of a file is head or kv_head, not {grain!r}.")
    if grain is None and unknown:
        note = f"{name} does not say whether it is of query heads, as it is read, or of kv heads."
        return entries, [note]
    return replace(entries, grain=grain or grid.grain_of(entries, rows, name)), []


def _name(model: Any) -> str | None:
    if isinstance(model, HeadTable):
        return model.model
    return getattr(model, "name", None)


def _standard_errors(entries: Entries) -> dict[Cell, float]:
    """The standard error over the samples of each head with two or more; none beyond a float."""
    with np.errstate(over="ignore"):
        errors = {
            place: float(np.std(values, ddof=1) / math.sqrt(len(values)))
            for place, values in entries.samples.items()
            if len(values) > 1
        }
    return {place: error for place, error in errors.items() if math.isfinite(error)}


def _about(entries: Entries) -> dict[str, About]:
    """How the score is read; {} for one of ours, which an `Atlas` looks up."""
    if entries.grain == "head" and entries.score in ("retrieval", "locos"):
        return {}
    if entries.format == "duo":
        return {
            entries.score: About(
                "Full attention",
                reading="1 needs the whole context, 0 only its first and recent tokens.",
                citation="Xiao et al. 2025, arXiv 2410.10819",
                low=0.0,
                high=1.0,
                grain="kv_head",
            )
        }
    title = entries.score.replace("_", " ").capitalize()
    return {entries.score: About(title, grain=entries.grain)}


def entries_of(
    table: HeadTable, score: str, tower: str = "", kind: str | None = None, group: str | None = None
) -> Entries:
    """The numbers of one score of a table, as a file holds them.

    Args:
        table: the table.
        score: its name.
        tower, kind: as in `HeadTable.matrix`.
        group: "mean" or "max": key/value heads in place of query heads.

    Raises:
        InputError: a score of layers; a grouping that is none, or where the kv heads are unknown.
    """
    grain = table.about(score).grain
    if grain == "layer":
        raise InputError(f"{score} is a score of layers, and score files are of heads.")
    where, which = table.panel(score, tower, kind)
    within = column_of(grain) or "head"
    rows = table.frame[(table.frame["tower"] == where) & (table.frame["kind"] == which)]
    if group is not None:
        rows, within = grouped(rows, score, grain, group), "kv_head"
        grain = "kv_head"
    rows = rows[np.isfinite(rows[score])].drop_duplicates(["layer", within])
    cells = list(zip(rows["layer"].tolist(), rows[within].tolist(), strict=True))
    said = table.provenance.get("interchange")
    said = dict(said) if isinstance(said, Mapping) else {}
    return Entries(
        format=str(said.get("format", "")),
        score=score,
        values=dict(zip(cells, rows[score].tolist(), strict=True)),
        samples={} if group is not None else dict(table.samples.get(score, {})),
        grain=grain,
        complete=said.get("format") in ("duo", "matrix"),
        listed=bool(said.get("listed")),
        said=said,
    )


def grouped(rows: pd.DataFrame, score: str, grain: str, group: str) -> pd.DataFrame:
    """The rows with each query head's score replaced by its group's mean or maximum.

    Raises `InputError` for another word, or where nothing says which heads share keys and values.
    """
    if group not in GROUPS:
        raise InputError(f"A group of query heads is joined by mean or max, not {group!r}.")
    if (rows["kv_head"] == grid.UNKNOWN).any():
        raise InputError(
            f"Nothing says which query heads of {score} share keys and values; read the file with "
            "model=."
        )
    if grain == "kv_head":
        return rows
    joined = rows.groupby(["tower", "kind", "layer", "kv_head"])[score].transform(GROUPS[group])
    whole = rows.groupby(["tower", "kind", "layer", "kv_head"])[score].transform(
        lambda values: np.isfinite(values).all()
    )
    errors = [c for c in (f"{score}_stderr", f"{score}_low", f"{score}_high") if c in rows]
    return rows.drop(columns=errors).assign(**{score: joined.where(whole.astype(bool), np.nan)})


def strongest(entries: Entries, k: int) -> Entries:
    """The k strongest heads as a list; ties by layer, then head. Raises `InputError`."""
    if not 0 < k <= len(entries.values):
        raise InputError(f"k is between 1 and the {len(entries.values)} heads measured, not {k}.")
    ranked = sorted(entries.values.items(), key=lambda item: (-item[1], item[0]))[:k]
    return replace(entries, values={place: 1.0 for place, _ in ranked}, samples={}, listed=True)
