"""Lists of heads without numbers, as PASTA takes them."""

from __future__ import annotations

import json
from typing import Any

from interp.errors import InputError
from interp.results.interchange.entries import LIMIT, Entries, cell, index, is_cell_name, once
from interp.results.interchange.file_format import FileFormat


class HeadList(FileFormat):
    """`{"3": [17, 7], "8": [28]}`, layer → heads (PASTA, Zhang et al. 2023, arXiv 2311.02262), or
    `[[3, 17], [8, 28]]`, or `["3-17", "L8H28"]`. Heads that are not named are 0.

    A layer with a number twice, or with one beyond any head, is a table of budgets and none of
    these.
    """

    name, what, score = "pasta", "a list of heads", "listed"

    def claims(self, content: Any) -> bool:
        if isinstance(content, dict):
            return bool(content) and all(
                _is_index(layer) and _is_heads(heads) for layer, heads in content.items()
            )
        return (
            isinstance(content, list)
            and bool(content)
            and (
                all(isinstance(e, str) and is_cell_name(e) for e in content)
                or all(isinstance(e, list) and len(e) == 2 and _is_heads(e, 1) for e in content)
            )
        )

    def read(self, content: Any) -> Entries:
        if isinstance(content, dict):
            layers = [index(layer, "layer") for layer in content]
            if len(set(layers)) < len(layers):
                raise InputError("A layer is there twice.")
            named = [
                (layer, index(head, "head"))
                for layer, heads in zip(layers, content.values(), strict=True)
                for head in heads
            ]
        else:
            named = [cell(entry) for entry in content]
        if not named:
            raise InputError("It names no head.")
        values = once((place, 1.0) for place in named)
        return Entries(self.name, self.score, values, listed=True)

    def write(self, entries: Entries) -> str:
        self.refuse_kv_heads(entries)
        if set(entries.values.values()) - {0.0, 1.0}:
            raise InputError(
                f"A list of heads has no numbers, and {entries.score} is not 0 or 1; say how many "
                "of its strongest heads with k=."
            )
        layers: dict[str, list[int]] = {}
        for (layer, head), value in sorted(entries.values.items()):
            if value:
                layers.setdefault(str(layer), []).append(head)
        if not layers:
            raise InputError(f"No head has {entries.score}, so there is nothing to list.")
        return json.dumps(layers) + "\n"


def _is_heads(values: Any, times: int = 2) -> bool:
    """Whole numbers that may be heads; for `times` > 1 none of them so often."""
    return (
        isinstance(values, list)
        and all(isinstance(v, int) and not isinstance(v, bool) and v < LIMIT for v in values)
        and (times == 1 or len(set(values)) == len(values))
    )


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit()
