"""What a circuit is made of, strongest first, and the model without some of it: heads, or edges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from interp.circuits.judging.alignment import scores_by_head
from interp.circuits.runs.edges import Graph, Stream
from interp.circuits.runs.paired_runs import ABLATIONS, PairedRuns
from interp.circuits.runs.subgraph import MODES, Receivers, Subgraph
from interp.errors import InputError
from interp_hooks.heads import Head

#: numbers held of what edges change, at most: (senders, prompts, tokens, d_model) of a batch
HELD = 1 << 27


class Parts(ABC):
    """The parts of a circuit by number, 0 the strongest."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def without(self, sets: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """(n,) margins on the clean prompts with each of these sets replaced, in order."""


class Heads(Parts):
    """The heads of a model, highest score first. Raises `InputError` for heads without a finite
    score, and for a `mode` that is none."""

    def __init__(self, runs: PairedRuns, circuit: Any, column: str | None, mode: str):
        _check_mode(mode, ABLATIONS, "Heads")
        self.runs, self.mode = runs, mode
        scores = scores_by_head(circuit, column)
        values = [scores.get(Head(h.layer, h.head), np.nan) for h in runs.heads]
        lacking = [str(h) for h, v in zip(runs.heads, values, strict=True) if not np.isfinite(v)]
        if lacking or len(scores) != len(runs.heads):
            what = (
                f"{', '.join(lacking[:5])} have no finite score"
                if lacking
                else "there are scores of other heads too"
            )
            raise InputError(
                f"Faithfulness needs one score for each head of {runs.model.name}, and {what}."
            )
        self.ranking = [runs.heads[i] for i in np.argsort(-np.array(values), kind="stable")]

    def __len__(self) -> int:
        return len(self.ranking)

    def without(self, sets: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        chosen = [sorted(self.ranking[i] for i in some) for some in sets]
        return self.runs.ablated(chosen, self.mode, "Faithfulness")


class Edges(Parts):
    """The edges of a model's graph, by the size of the score that a circuit gives them; those that
    it doesn't list come last, in order. Raises `InputError` for a circuit without edges or with
    edges of another model, `TapError` where edges can't be told apart."""

    def __init__(self, runs: PairedRuns, circuit: Any, mode: str):
        _check_mode(mode, MODES, "Edges")
        self.runs, self.mode = runs, mode
        self.stream = Stream(runs)
        self.receivers = Receivers(runs, self.stream)
        scores = edge_scores(self.stream.graph, circuit)
        place = np.flatnonzero(self.stream.graph.allowed)
        order = np.argsort(-np.abs(scores.ravel()[place]), kind="stable")
        #: numbers in the flat (senders, receivers), strongest first
        self.ranking = place[order]

    def __len__(self) -> int:
        return len(self.ranking)

    def without(self, sets: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        graph, model = self.stream.graph, self.runs.model
        W_O = self.stream.weights[self.stream.first].W_O  # (heads, d_head, d_model)
        removed = torch.zeros(len(sets), *graph.allowed.shape)
        for row, some in zip(removed, sets, strict=True):
            row.view(-1)[torch.from_numpy(self.ranking[list(some)])] = 1
        width = len(graph.senders) * W_O.shape[-1]
        margins: list[list[np.ndarray]] = [[] for _ in sets]
        for pairs in self.runs.prompts.batches(model, max(64, HELD // width)):
            sub = Subgraph(self.stream, self.receivers, pairs, self.mode)
            for row, mask in zip(margins, removed, strict=True):
                (logits,) = sub.logits(mask[None], self.stream.first)
                row.append(pairs.margins(logits).double().cpu().numpy())
        for row in margins:
            self.runs.step("Faithfulness")
            yield np.concatenate(row)


def edge_scores(graph: Graph, circuit: Any) -> np.ndarray:
    """(senders, receivers): what a circuit's table of edges says of each, 0 where nothing. Raises
    `InputError` where it has no edges, or others than this model."""
    table = getattr(circuit, "edges", None)
    if table is None or not len(table):
        raise InputError(
            "This circuit has no edges; find it by a method that gives them: eap, eap_ig, acdc."
        )
    row = {name: i for i, name in enumerate(graph.senders)}
    column = {receiver: i for i, receiver in enumerate(graph.receivers)}
    scores = np.zeros(graph.allowed.shape)
    for edge in table.itertuples(index=False):
        u, v = row.get(edge.sender), column.get((edge.receiver, edge.kind))
        if u is None or v is None or not graph.allowed[u, v]:
            kind = f" ({edge.kind})" if edge.kind else ""
            raise InputError(
                f"The model has no edge {edge.sender} → {edge.receiver}{kind}; give a circuit of "
                "its own, with edges into queries, keys and values."
            )
        scores[u, v] = edge.score
    return scores


def _check_mode(mode: str, modes: Sequence[str], what: str) -> None:
    if mode not in modes:
        raise InputError(f"{what} are replaced by {', '.join(modes)}, not {mode!r}.")
