"""What one step of the engine runs of each request, cut where what acts on it changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from interp_vllm.program import Change, Program
from interp_vllm.record import Record


@dataclass(frozen=True)
class Run:
    """Some tokens of one request in one step.

    Attributes:
        index: the request's row in the tables of pages.
        first, count: its rows among the step's tokens.
        position: of its first row in the sequence.
        prompt: tokens of its prompt.
    """

    index: int
    first: int
    count: int
    position: int
    prompt: int


@dataclass(frozen=True)
class Part:
    """Rows of a run on which the same edits act.

    Attributes:
        index, first, count, position: as of a `Run`.
        generated: whether the rows' tokens were generated.
        program: of the request.
        record: where its statistics go, and which row; None where none are wanted.
    """

    index: int
    first: int
    count: int
    position: int
    generated: bool
    program: Program
    record: tuple[Record, int] | None = None


@dataclass(frozen=True)
class Patch:
    """Rows first … stop − 1 of the output times gain (layers, rows or 1, heads, 1), plus offset
    (layers, rows or 1, heads, d) or None, in the layers that have any."""

    first: int
    stop: int
    gain: torch.Tensor
    offset: torch.Tensor | None
    layers: frozenset[int]


def parts_of(run: Run, program: Program, record: Record | None) -> list[Part]:
    """A run cut at the end of the prompt, where an edit begins or ends, and around each row whose
    statistics are wanted."""
    start, stop = run.position, run.position + run.count
    cuts = {start, stop, *(e for e in (run.prompt, *program.edges) if start < e < stop)}
    wanted = range(max(start, record.next), stop) if record is not None else range(0)
    cuts.update(wanted)
    if len(wanted):
        cuts.add(wanted[-1] + 1)
    edges = sorted(cuts)
    parts = []
    for a, b in itertools.pairwise(edges):
        row = record.open(a) if record is not None and a in wanted else None
        kept = None if record is None or row is None else (record, row)
        at = run.first + a - start
        parts.append(Part(run.index, at, b - a, a, a >= run.prompt, program, kept))
    return parts


class Step:
    """One step: the parts that read the cache, and what happens to the output after it."""

    def __init__(self, runs: Iterable[tuple[Run, Program, Record | None]]) -> None:
        self.parts: list[Part] = []
        changed: list[tuple[int, int, Change]] = []
        for run, program, record in runs:
            for part in parts_of(run, program, record):
                if program.inside or part.record is not None:
                    self.parts.append(part)
                change = program.change(part.position, part.generated)
                if change is not None:
                    changed.append((part.first, part.first + part.count, change))
        self.patches = patches_of(changed)

    def __bool__(self) -> bool:
        return bool(self.parts or self.patches)


def patches_of(changed: Sequence[tuple[int, int, Change]]) -> list[Patch]:
    """Changes of rows, single neighbours as one, so that a step of many requests that generate is
    one multiplication a layer."""
    groups: list[list[tuple[int, int, Change]]] = []
    for one in sorted(changed, key=lambda c: c[0]):
        single = one[1] - one[0] == 1
        last = groups[-1][-1] if groups else None
        if single and last and last[1] == one[0] and last[1] - last[0] == 1:
            groups[-1].append(one)
        else:
            groups.append([one])
    return [_patch(group) for group in groups]


def _patch(group: list[tuple[int, int, Change]]) -> Patch:
    changes = [change for _, _, change in group]
    gain = torch.stack([c.gain for c in changes], 1)[..., None]  # (layers, rows, heads, 1)
    offset = None
    if any(c.offset is not None for c in changes):
        shape: Any = next(c.offset.shape for c in changes if c.offset is not None)
        none = torch.zeros(shape)
        offset = torch.stack([none if c.offset is None else c.offset for c in changes], 1)
    layers = frozenset().union(*(c.layers for c in changes))
    return Patch(group[0][0], group[-1][1], gain, offset, layers)
