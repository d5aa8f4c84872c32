"""Rows of a task's file: a JSON list of objects, or an object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interp.errors import InputError
from interp.inputs.text import read_file
from interp.support.json_text import parse


def read_rows(path: str | Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file, each with text in all `columns`.

    Raises `InputError` for a file that can't be read, a row that lacks a column, or too few rows.
    """
    content = read_file(path, "task")
    try:
        whole = content.lstrip().startswith("[")
        rows = parse(content) if whole else [parse(s) for s in content.splitlines() if s]
    except json.JSONDecodeError as reason:
        raise InputError(
            f"The task file {path} is neither a JSON list nor an object a line ({reason})."
        ) from reason
    for number, row in enumerate(rows, 1):
        values = row.values() if isinstance(row, dict) else ()
        if not isinstance(row, dict) or any(not str(row.get(c, "")).strip() for c in columns):
            raise InputError(
                f"Row {number} of {path} is not an object with {' and '.join(columns)}: "
                f"{json.dumps(list(values) or row, ensure_ascii=False)[:60]}"
            )
    if len(rows) < 2:
        raise InputError(f"The task file {path} has {len(rows)} rows; give at least two.")
    return [{**row, **{c: str(row[c]) for c in columns}} for row in rows]


def task_file(path: str | Path) -> tuple[str, ...]:
    """Which columns a task's file has: ("text", "label") or ("input", "output").

    Raises `InputError` where its first row has neither pair.
    """
    first = read_rows(path, ())[0]
    for columns in (("text", "label"), ("input", "output")):
        if all(c in first for c in columns):
            return columns
    raise InputError(
        f"The task file {path} holds neither {{text, label}} nor {{input, output}} rows; its "
        f"first has {', '.join(first) or 'nothing'}."
    )
