"""A number for each head as a table in JSON: scores, or budgets of a head-wise cache."""

from __future__ import annotations

import json
from typing import Any

from interp.errors import InputError
from interp.results.interchange.entries import LIMIT, Entries, number
from interp.results.interchange.file_format import FileFormat


class Matrix(FileFormat):
    """`[[0.1, 0.9], …]`, or `{"0": [0.1, 0.9], …}`: (layers, heads). Whole numbers are the tokens
    that a head-wise cache (HeadKV, AdaKV) keeps for each, and the score is called budget.

    Such a file does not say whether its columns are query heads or key/value heads.
    """

    name, what = "matrix", "JSON of (layers, heads)"

    def claims(self, content: Any) -> bool:
        rows = _rows(content)
        return (
            bool(rows)
            and all(isinstance(r, list) and r for r in rows)
            and all(isinstance(v, int | float) for r in rows for v in r)
        )

    def read(self, content: Any) -> Entries:
        rows = _rows(content)
        widths = {len(row) for row in rows}
        if len(widths) > 1:
            raise InputError(
                f"A table of heads has as many in each layer; this one has {min(widths)} to "
                f"{max(widths)}."
            )
        if len(rows) > LIMIT or max(widths) > LIMIT:
            raise InputError(f"No model has {len(rows)} layers of {max(widths)} heads.")
        whole = all(isinstance(v, int) for row in rows for v in row)
        values = {
            (layer, head): number(value, f"Head {layer}-{head}")
            for layer, row in enumerate(rows)
            for head, value in enumerate(row)
        }
        whole = whole and not set(values.values()) <= {0.0, 1.0}  # a mask is no budget
        if whole and min(values.values()) < 0:
            raise InputError("A budget is a number of tokens, and can't be negative.")
        return Entries(self.name, "budget" if whole else self.score, values, complete=True)

    def write(self, entries: Entries) -> str:
        layers, heads = entries.box
        if len(entries.values) < layers * heads:
            raise InputError(
                f"A table has a number for each head, and {entries.score} was not measured in all."
            )
        rows = [[entries.values[n, h] for h in range(heads)] for n in range(layers)]
        if entries.score == "budget" and all(v == int(v) for row in rows for v in row):
            rows = [[int(v) for v in row] for row in rows]
        return json.dumps(rows) + "\n"


def _rows(content: Any) -> list[Any]:
    """The rows of a list, or of an object whose keys are 0, 1, … in any order; [] for others."""
    if isinstance(content, dict):
        wanted = [str(n) for n in range(len(content))]
        return [content[n] for n in wanted] if set(wanted) == set(content) else []
    return content if isinstance(content, list) else []
