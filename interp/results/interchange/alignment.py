"""Two head tables on one grid, where one or both come from a file that knows no grid."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from interp.errors import InputError
from interp.results.head_table import HeadTable
from interp.results.interchange.tables import Arguments, entries_of, table_of
from interp.results.interchange.tables import grouped as joined


def gridless(table: HeadTable) -> bool:
    """Whether it was read from a file and laid on no model's heads."""
    said = table.provenance.get("interchange")
    return isinstance(said, dict) and said.get("grid") == "file"


def aligned(one: HeadTable, other: HeadTable) -> tuple[HeadTable, HeadTable]:
    """Both tables, with what was read from files laid on the heads of the other.

    Raises:
        InputError: they are of models of different sizes; two lists of heads, of which neither
            says how large the model is.
    """
    if not gridless(one) and not gridless(other):
        return one, other
    if gridless(one) and gridless(other):
        return _both(one, other)
    return (_laid(one, other), other) if gridless(one) else (one, _laid(other, one))


def _laid(table: HeadTable, like: HeadTable) -> HeadTable:
    """The file's only score on the heads of another table."""
    entries = entries_of(table, table.scores[0])
    return _made(table, table_of(entries, _file(table), like))


def _made(table: HeadTable, arguments: Arguments) -> HeadTable:
    frame, provenance, notes, about, samples = arguments
    made = type(table)(frame, provenance, notes, about)
    made.samples = samples
    return made


def _both(one: HeadTable, other: HeadTable) -> tuple[HeadTable, HeadTable]:
    mine, theirs = (entries_of(table, table.scores[0]) for table in (one, other))
    if mine.grain != theirs.grain:
        raise InputError(
            "One file is of key/value heads and the other of query heads; read them with model=, "
            "so that it is known which belong together."
        )
    if mine.sparse and theirs.sparse:
        raise InputError(
            "Both files name only some heads, and neither says how many the model has; read them "
            "with model= (on the command line --shape LAYERSxHEADS)."
        )
    layers, heads = (theirs if mine.sparse else mine).box
    kv = (heads,) if mine.grain == "kv_head" else ()
    sizes = (layers, heads, *kv)
    tables = []
    for table, entries in ((one, mine), (other, theirs)):
        arguments = table_of(entries, _file(table), sizes)
        arguments.provenance["model"] = table.model
        if kv:
            arguments.provenance["interchange"]["query_heads"] = "unknown"
        tables.append(_made(table, arguments))
    return tables[0], tables[1]


def _file(table: HeadTable) -> str:
    return str(table.provenance["interchange"]["file"])


def pairs(one: HeadTable, other: HeadTable, score: str | None = None) -> list[tuple[str, str]]:
    """The scores of two tables that are held against each other.

    Those of one name; where a file's score has no namesake, it is held against each score of the
    other side, or against `score`.

    Raises:
        UnknownNameError: the first has no such score.
        InputError: no score is shared.
    """
    if score is not None:
        one.about(score)  # refuses a name that is not there
        if score in other.scores:
            return [(score, score)]
        if len(other.scores) == 1 and _from_file(other):
            return [(score, other.scores[0])]
        raise InputError(
            f"The second has no score {score!r}; it has {', '.join(other.scores) or 'none'}."
        )
    shared = [(s, s) for s in one.scores if s in other.scores]
    if shared or not (_from_file(one) or _from_file(other)):
        return shared
    return [(s, t) for s in one.scores for t in other.scores if _heads(one, s) == _heads(other, t)]


def _heads(table: HeadTable, score: str) -> bool:
    return table.about(score).grain != "layer"


def _from_file(table: HeadTable) -> bool:
    return isinstance(table.provenance.get("interchange"), dict)


def grouped(table: HeadTable, scores: Iterable[str], group: str) -> HeadTable:
    """The table with scores of query heads as scores of key/value heads, each its group's mean or
    maximum. Raises `InputError`."""
    frame, about = table.frame, {s: table.about(s) for s in table.scores}
    for score in dict.fromkeys(scores):
        if about[score].grain == "layer":
            continue
        frame = joined(frame, score, about[score].grain, group)
        about[score] = replace(about[score], grain="kv_head")
    return type(table)(frame, table.provenance, table.notes, about)


def parse_shape(written: str) -> tuple[int, ...]:
    """ "32x32" or "32x32x8" as (layers, heads) or (layers, heads, key/value heads). Raises
    `InputError`."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[x×,]\s*(\d{1,6})(?:\s*[x×,]\s*(\d{1,6}))?\s*", written)
    if match is None:
        raise InputError(
            f"A model's shape is LAYERSxHEADS or LAYERSxHEADSxKVHEADS, like 32x32x8, not "
            f"{written!r}."
        )
    return tuple(int(n) for n in match.groups() if n is not None)
