"""One number a head, under its name, with its name, or in an object of its own."""

from __future__ import annotations

import json
from typing import Any

from interp.errors import InputError
from interp.results.interchange.entries import (
    Cell,
    Entries,
    cell,
    index,
    is_cell_name,
    number,
    once,
)
from interp.results.interchange.file_format import FileFormat
from interp.results.interchange.retrieval_head import mean, sample_lists


class Values(FileFormat):
    """`{"16-19": 0.94, …}`: layer-head → one number."""

    name, what = "values", "JSON of a number a head"

    def claims(self, content: Any) -> bool:
        return (
            isinstance(content, dict)
            and bool(content)
            and all(not isinstance(v, list | dict) for v in content.values())
            and all(is_cell_name(k) for k in content)
        )

    def read(self, content: Any) -> Entries:
        pairs = ((cell(name), number(value, f"Head {name}")) for name, value in content.items())
        return Entries(self.name, self.score, once(pairs))

    def write(self, entries: Entries) -> str:
        self.refuse_kv_heads(entries)
        return json.dumps({f"{n}-{h}": v for (n, h), v in sorted(entries.values.items())}) + "\n"


class Nested(FileFormat):
    """`{"16": {"19": 0.94}}`, or `{"16": {"19": [0.9, 1.0]}}`: layer → head → a number, or one a
    sample."""

    name, what = "nested", "JSON of layers of heads"

    def claims(self, content: Any) -> bool:
        return (
            isinstance(content, dict)
            and bool(content)
            and all(_is_index(n) and isinstance(v, dict) for n, v in content.items())
            and all(_is_index(h) for heads in content.values() for h in heads)
        )

    def read(self, content: Any) -> Entries:
        named = once(
            ((index(layer, "layer"), index(head, "head")), value)
            for layer, heads in content.items()
            for head, value in heads.items()
        )
        if any(isinstance(value, list) for value in named.values()):
            samples = sample_lists({f"{n}-{h}": value for (n, h), value in named.items()})
            means = {place: mean(values) for place, values in samples.items() if values}
            return Entries(self.name, self.score, means, samples)
        values = {p: number(value, f"Head {p[0]}-{p[1]}") for p, value in named.items()}
        if not values:
            raise InputError("It names no head.")
        return Entries(self.name, self.score, values)

    def write(self, entries: Entries) -> str:
        self.refuse_kv_heads(entries)
        layers: dict[str, dict[str, Any]] = {}
        for (layer, head), value in sorted(entries.values.items()):
            held = entries.samples.get((layer, head))
            layers.setdefault(str(layer), {})[str(head)] = list(held) if held else value
        return json.dumps(layers) + "\n"


class Ranked(FileFormat):
    """`[[0.94, [16, 19]], …]`, or `[[[16, 19], 0.94], …]`: pairs of a number and a head, the
    strongest first."""

    name, what = "ranked", "JSON of ranked heads"

    def claims(self, content: Any) -> bool:
        return isinstance(content, list) and bool(content) and all(map(_is_pair, content))

    def read(self, content: Any) -> Entries:
        pairs = [pair if _is_place(pair[0]) else pair[::-1] for pair in content]
        cells = ((cell(where), number(value, f"Head {where}")) for where, value in pairs)
        return Entries(self.name, self.score, once(cells))

    def write(self, entries: Entries) -> str:
        self.refuse_kv_heads(entries)
        ranked = sorted(entries.values.items(), key=lambda item: (-item[1], item[0]))
        return json.dumps([[value, list(place)] for place, value in ranked]) + "\n"


class Records(FileFormat):
    """`[{"layer": 16, "head": 19, "score": 0.94}, …]`: an object a head."""

    name, what = "records", "JSON of an object a head"

    def claims(self, content: Any) -> bool:
        return (
            isinstance(content, list)
            and bool(content)
            and all(isinstance(e, dict) and {"layer", "head"} <= set(e) for e in content)
        )

    def read(self, content: Any) -> Entries:
        names = {name for entry in content for name in entry} - {"layer", "head"}
        if len(names) != 1:
            raise InputError(
                "An object a head has layer, head and one number; these have "
                f"{', '.join(sorted(names)[:8]) or 'nothing'} beside layer and head."
            )
        name = names.pop()
        pairs: list[tuple[Cell, float]] = []
        for entry in content:
            where = cell([entry["layer"], entry["head"]])
            pairs.append((where, number(entry.get(name), f"Head {where[0]}-{where[1]}")))
        return Entries(self.name, name or self.score, once(pairs))

    def write(self, entries: Entries) -> str:
        self.refuse_kv_heads(entries)
        if entries.score in ("layer", "head"):
            raise InputError(f"A score called {entries.score} can't stand beside layer and head.")
        rows = [
            {"layer": n, "head": h, entries.score: v}
            for (n, h), v in sorted(entries.values.items())
        ]
        return json.dumps(rows) + "\n"


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _is_place(value: Any) -> bool:
    return isinstance(value, list | str) and is_cell_name(value)


def _is_pair(entry: Any) -> bool:
    return (
        isinstance(entry, list) and len(entry) == 2 and _is_place(entry[0]) != _is_place(entry[1])
    )
