"""Edge attribution patching with integrated gradients: gradients averaged on the way from corrupted
to clean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from interp.circuits.methods.eap import EAP
from interp.circuits.runs.edges import Stream, pair_runs
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Pairs
from interp.circuits.runs.slopes import Live, Slopes, products
from interp_hooks.activations import Activations, Hook


@dataclass(frozen=True)
class EAPIG(EAP):
    """score(u → v) = Σ over positions of (u(x) − u(x')) · mean over k of ∂m/∂(input of v) at run k.

    `points`: k = 1 … steps, which ends with the clean run ("right", the paper's text), or k = 0 …
    steps − 1, which begins with the corrupted one ("left", the released code).

    mode "inputs" (Hanna et al.): run k has the embedding x' + k/steps · (x − x'). Summed over the
    receivers, the edges of the input approach m(x) − m(x') as steps grow. One step on the right is
    `eap`.

    mode "activations" (integrated gradients at the senders, as Marks et al. 2024, arXiv
    2403.19647): each group of senders has its own runs: the embedding, the heads of each layer,
    each MLP. In run k the group writes u(x') + k/steps · (u(x) − u(x')), and all else follows.
    Summed over a group, edges approach m(x) − m(x with that group resampled), unless a norm after
    the heads is held (see `eap`). It takes (2 · layers + 1) · steps backwards. (The code published
    with Hanna et al. adds the gradients of every group's runs to every edge, and stops gradients at
    the interpolated senders.)

    Head scores, signs and refusals are those of `eap`.

    Misleads:
        A few points are no integral: "right" and "left" differ. The gradient at each run is still
        that of the whole softmax and norms there, of first order.
    """

    steps: int = 5
    mode: str = "inputs"
    points: str = "right"

    name = "eap_ig"
    title = "EAP with integrated gradients"
    summary = "as eap, gradients averaged between corrupted and clean"
    reading = (
        "The strongest edge out of this head, with gradients averaged on the way from "
        "corrupted to clean."
    )
    formula = "max over v of |mean Σ (u(x) − u(x')) · mean over k of ∂m/∂(input of v) at run k|"
    citation = "Hanna et al. 2024, arXiv 2403.17806, section 3"
    presets = {
        "paper": {"points": "right"},
        "code": {"points": "left"},
        "activations": {"mode": "activations"},
    }

    def check(self) -> None:
        self.choice("mode", "inputs", "activations")
        self.choice("points", "right", "left")
        self.at_least(1, "steps")

    def scores(self, runs: PairedRuns, stream: Stream) -> np.ndarray:
        scores, slopes = np.zeros(stream.graph.allowed.shape), Slopes(stream)
        batches, groups = slopes.batches(), self._groups(stream)
        runs.expect(len(batches) * len(groups) * self.steps)
        for pairs in batches:
            clean, corrupted = pair_runs(runs, pairs)
            for rows, place, layer in groups:
                part = np.zeros_like(scores)
                back = _difference(stream, place, layer, clean, corrupted)
                on_the_way = self._way(slopes, pairs, place, layer, back)
                products(slopes, on_the_way, clean, corrupted, part, rows)
                scores[rows] += part[rows] / self.steps
        return scores

    def _way(
        self, slopes: Slopes, pairs: Pairs, place: str, layer: int, back: torch.Tensor
    ) -> Iterator[Live]:
        """The runs between corrupted and clean, one after another."""
        first = 1 if self.points == "right" else 0
        for k in range(first, first + self.steps):
            yield slopes.live(pairs, _shift(place, layer, back * (k / self.steps - 1)))
            slopes.runs.step(self.title)

    def _groups(self, stream: Stream) -> Sequence[tuple[slice, str, int]]:
        """(senders, where they write, layer) of each group that is interpolated by itself."""
        if self.mode == "inputs":
            return [(slice(None), "pre", stream.first)]
        graph = stream.graph
        groups = [(slice(0, 1), "pre", stream.first)]
        for layer, rows in graph.rows.items():
            groups.append((rows, "z", layer))
            if layer in graph.mlp:
                groups.append((slice(graph.mlp[layer], graph.mlp[layer] + 1), "post", layer))
        return groups


def _difference(
    stream: Stream, place: str, layer: int, clean: Activations, corrupted: Activations
) -> torch.Tensor:
    """Clean minus corrupted at the wire through which a group writes."""
    if place == "post":
        return stream.mlp(layer, clean) - stream.mlp(layer, corrupted)
    return clean[place, layer] - corrupted[place, layer]


def _shift(place: str, layer: int, by: torch.Tensor) -> Hook:
    """A rewrite that adds to one wire and lets gradients pass."""
    return lambda at, number, tensor: tensor + by if (at, number) == (place, layer) else None
