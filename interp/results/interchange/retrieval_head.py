"""Retrieval_Head's JSON: the scores of each head, one a sample."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from interp.errors import InputError
from interp.results.interchange.entries import Cell, Entries, cell, is_cell_name, number, once
from interp.results.interchange.file_format import FileFormat


class RetrievalHead(FileFormat):
    """`{"16-19": [0.9, 1.0, …], …}`: layer-head → its score in each sample that counted.

    What Retrieval_Head (Wu et al. 2024, arXiv 2404.15574), its descendants HeadKV and LOCOS'
    behavioural detector write. A head's score is the mean; one with an empty list was not measured.
    """

    name, what, score = "retrieval_head", "Retrieval_Head JSON", "retrieval"

    def claims(self, content: Any) -> bool:
        return (
            isinstance(content, dict)
            and bool(content)
            and all(isinstance(v, list) for v in content.values())
            and all(is_cell_name(k) for k in content)
        )

    def read(self, content: Any) -> Entries:
        samples = sample_lists(content)
        means = {place: mean(values) for place, values in samples.items() if values}
        empty = len(samples) - len(means)
        notes = [f"{empty} heads have no sample and count as not measured."] if empty else []
        return Entries(self.name, self.score, means, samples, notes=tuple(notes))

    def write(self, entries: Entries) -> str:
        self.refuse_kv_heads(entries)
        return json.dumps(lists_of(entries)) + "\n"


def sample_lists(content: Mapping[str, Any]) -> dict[Cell, tuple[float, ...]]:
    """layer-head → list, as cells and tuples of finite numbers. Raises `InputError`; also where no
    head has a sample."""
    lists = once((cell(name), (name, values)) for name, values in content.items())
    samples = {}
    for place, (name, values) in lists.items():
        if not isinstance(values, list):
            raise InputError(f"Head {name} has {type(values).__name__} where a list belongs.")
        samples[place] = tuple(number(v, f"Head {name}") for v in values)
    if not any(samples.values()):
        raise InputError(
            "It holds no score: no sample counted (Retrieval_Head drops those whose answer "
            "does not match the needle)."
        )
    return samples


def mean(values: tuple[float, ...]) -> float:
    """Their mean; a single one is itself, to the bit."""
    try:
        return math.fsum(values) / len(values)
    except OverflowError:  # the sum is beyond a float, the mean is not
        return math.fsum(value / len(values) for value in values)


def lists_of(entries: Entries) -> dict[str, list[float]]:
    """layer-head → its samples, or its one number where those are not known, in order."""
    return {
        f"{layer}-{head}": list(entries.samples.get((layer, head)) or (value,))
        for (layer, head), value in sorted(entries.values.items())
    }
