"""ACDC: remove edges one by one, from the output back, as long as the model's answers stay the
same."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.divergence import divergence, log_probabilities
from interp.circuits.runs.edges import Graph, Stream
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.subgraph import MODES, Receivers, Subgraph
from interp.errors import InputError
from interp.support.checkpoints import Record

METRICS = ("kl", "margin")


@dataclass(frozen=True)
class ACDC(Method):
    """Edges that survive pruning at threshold τ. Receivers are taken from the output back to the
    first layer, the senders into each from the latest to the embedding; the edge goes if the loss
    of the model without it, on the clean prompts, is less than τ above the loss so far.

    The loss is KL(clean model ‖ pruned model) of the next token at the judged positions, in nats
    ("kl"), or minus the task's margin ("margin"). A removed edge carries what its sender wrote in
    the corrupted twin ("resample"), or nothing ("zero"). An edge into a head none of whose own
    edges is left goes without a run, as it cannot matter.

    A head's score is the largest of `thresholds` at which an edge out of it survives, 0 if none; an
    edge's likewise. Query heads that share keys and values share these receivers ("L2KV1").
    Positions are pooled, MLPs are whole nodes.

    All thresholds run side by side, up to `at_once` edges of each, with the decisions of one edge
    at a time; layers before the receiver are not run again. Still it is a pass an edge and
    threshold, or more: 1 055 edges of 4 layers × 8 heads (4 key-value heads), 32 491 of GPT-2
    small, which is days of CPU. A note tells the passes and seconds that it took. With `resume=`
    what is decided is kept, receiver by receiver.

    Where a norm stands between heads and stream (Gemma 2 and 3, OLMo 2), it is taken anew for each
    receiver, with the heads replaced whose edge into it is removed; no scale is held.

    Raises `TapError` where the stream is not the sum of what heads and MLPs write, or where
    queries, keys and values are not a norm and a projection of it.

    Misleads:
        A score is one of the thresholds, so most heads tie. The search is greedy: what goes early
        depends on the order, and never comes back.
    """

    thresholds: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    metric: str = "kl"
    mode: str = "resample"
    at_once: int = 4

    name = "acdc"
    title = "ACDC"
    summary = "greedy pruning of edges from the output back: a pass an edge"
    reading = "The largest threshold at which an edge out of this head survives pruning."
    formula = (
        "max τ with an edge (h → v) for which loss(without it) − loss(with it) ≥ τ when its "
        "turn comes"
    )
    citation = "Conmy et al. 2023, arXiv 2304.14997, section 3, algorithm 1"
    presets = {"zero": {"mode": "zero"}, "margin": {"metric": "margin"}}

    def check(self) -> None:
        self.choice("metric", *METRICS)
        self.choice("mode", *MODES)
        self.at_least(1, "at_once")
        if (
            not self.thresholds
            or min(self.thresholds) <= 0
            or not np.isfinite(self.thresholds).all()
        ):
            raise InputError(
                f"thresholds of {self.name} are one or more numbers above 0, not "
                f"{self.thresholds!r}."
            )

    def find(self, runs: PairedRuns) -> Found:
        started, stream = time.perf_counter(), Stream(runs)
        graph, before = stream.graph, runs.forwards
        edges = _Pruning(runs, stream, self).kept()  # (thresholds, senders, receivers)
        tau = np.array(self.thresholds)
        scores = (edges * tau[:, None, None]).max(0)
        left = ", ".join(f"{int(k.sum())} at {t:g}" for t, k in zip(tau, edges, strict=True))
        note = (
            f"ACDC: of {int(graph.allowed.sum())} edges survive {left}; "
            f"{runs.forwards - before:,.0f} passes over the prompts, those of a resumed search "
            f"included, in {time.perf_counter() - started:,.0f} seconds."
        )
        return Found(
            scores[graph.heads].max(1), edges=graph.table(scores, scores > 0), notes=[note]
        )


class _Pruning:
    """The greedy search at all thresholds at once; each decides by itself."""

    def __init__(self, runs: PairedRuns, stream: Stream, method: ACDC):
        self.runs, self.graph, self.method = runs, stream.graph, method
        receivers = Receivers(runs, stream)
        # all copies of a batch run together
        batches = runs.batches(copies=len(method.thresholds) * method.at_once)
        self.parts = [Subgraph(stream, receivers, pairs, method.mode) for pairs in batches]
        shape = (len(method.thresholds), *self.graph.allowed.shape)
        self.removed = np.zeros(shape, dtype=bool)
        self.wanted: list[list[torch.Tensor]] = []
        clean = [part.logits(torch.zeros(1, *shape[1:]), runs.layers[-1])[0] for part in self.parts]
        if method.metric == "kl":
            self.wanted = [
                [log_probabilities(rows) for rows in p.pairs.judged(c)]
                for p, c in zip(self.parts, clean, strict=True)
            ]
        self.loss = np.repeat(self._loss([c[None] for c in clean]), len(method.thresholds))

    def kept(self) -> np.ndarray:
        """(thresholds, senders, receivers) bool: edges that survive."""
        graph, runs = self.graph, self.runs
        runs.expect(int(graph.allowed.sum()))
        for layer, receivers in _backwards(runs, graph):
            for receiver in receivers:
                senders = np.nonzero(graph.allowed[:, receiver])[0][::-1]
                key = f"acdc-{receiver}"
                if runs.pieces.has(key):
                    self._restore(key, receiver)
                    runs.step(self.method.title, len(senders))
                else:
                    before = runs.forwards
                    self._prune(layer, receiver, senders)
                    self._keep(key, receiver, runs.forwards - before)
        return graph.allowed & ~self.removed

    def _prune(self, layer: int, receiver: int, senders: np.ndarray) -> None:
        """Decide on the edges from `senders`, in this order, into one receiver.

        Each threshold tries several edges in a row at once, trial i without the first i + 1 of
        them; what comes after the first that stays is tried again with it, so that decisions are
        those of one edge at a time."""
        tau, alive = np.array(self.method.thresholds), self._alive(layer, receiver)
        self.removed[~alive, :, receiver] = self.graph.allowed[:, receiver]
        at = {int(t): 0 for t in np.nonzero(alive)[0]}  # threshold → edges decided
        ahead, done = dict.fromkeys(at, 1), 0
        while done < len(senders):
            tried = {t: senders[at[t] : at[t] + ahead[t]] for t in at}
            trials = []
            for t, some in tried.items():
                trial = self.removed[t].copy()
                for sender in some:
                    trial[sender, receiver] = True
                    trials.append(trial.copy())
            if trials:
                wanted = torch.from_numpy(np.stack(trials))
                losses = iter(self._loss([part.logits(wanted, layer) for part in self.parts]))
            for t, some in tried.items():
                found, good = [next(losses) for _ in some], True
                for sender, loss in zip(some, found, strict=True):
                    at[t] += 1
                    if not loss - self.loss[t] < tau[t]:
                        good = False
                        break
                    self.removed[t, sender, receiver], self.loss[t] = True, loss
                ahead[t] = min(2 * ahead[t], self.method.at_once) if good else 1
            reached = min(at.values(), default=len(senders))
            self.runs.step(self.method.title, reached - done)
            done = reached

    def _keep(self, key: str, receiver: int, forwards: float) -> None:
        """Save what was decided on a receiver."""
        records = [Record("forwards", 0, "", "", 0, 0, forwards)]
        records += [Record("loss", t, "", "", 0, 0, float(x)) for t, x in enumerate(self.loss)]
        records += [
            Record("removed", int(t), "", "", 0, int(s), 1.0)
            for t, s in zip(*np.nonzero(self.removed[:, :, receiver]), strict=True)
        ]
        self.runs.pieces.save(key, records)

    def _restore(self, key: str, receiver: int) -> None:
        """Take what an earlier search decided on a receiver for this one's."""
        table = self.runs.pieces.records([key])
        removed, loss = table[table.score == "removed"], table[table.score == "loss"]
        self.removed[removed["sample"], removed["head"], receiver] = True
        self.loss[loss["sample"]] = loss["value"]
        self.runs.skipped(float(table.value[table.score == "forwards"].sum()))

    def _alive(self, layer: int, receiver: int) -> np.ndarray:
        """(thresholds,): whether what `receiver` is part of still writes to anything."""
        name, kind = self.graph.receivers[receiver]
        if name == "output":
            return np.ones(len(self.removed), dtype=bool)
        if kind == "":
            rows = [self.graph.mlp[layer]]
        else:
            site = self.runs.sites[layer]
            number = receiver - self.graph.columns[layer].start
            own = number if kind == "q" else (number - site.n_heads) % site.n_kv_heads
            readers = [
                h for h in range(site.n_heads) if (h if kind == "q" else site.kv_head(h)) == own
            ]
            rows = [self.graph.rows[layer].start + h for h in readers]
        return np.any(self.graph.allowed[rows] & ~self.removed[:, rows], axis=(1, 2))

    def _loss(self, logits: list[torch.Tensor]) -> np.ndarray:
        """(models,) mean over all prompts, from logits (models, batch, last slots, vocabulary) of
        each batch."""
        totals = torch.zeros(len(logits[0]), dtype=torch.float64, device=logits[0].device)
        for number, (part, variants) in enumerate(zip(self.parts, logits, strict=True)):
            if self.method.metric == "margin":
                here = [-part.pairs.margins(one).double().sum() for one in variants]
            else:
                here = [divergence(self.wanted[number], part.pairs, one) for one in variants]
            totals += torch.stack(here)
        return totals.cpu().numpy() / len(self.runs.prompts)


def _backwards(runs: PairedRuns, graph: Graph) -> list[tuple[int, list[int]]]:
    """(layer from which to run, receivers), from the output to the first layer; the MLP before the
    heads."""
    order = [(runs.layers[-1], [len(graph.receivers) - 1])]
    return order + [
        (n, list(range(c.stop - 1, c.start - 1, -1))) for n, c in reversed(graph.columns.items())
    ]
