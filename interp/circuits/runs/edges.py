"""Edges between heads and MLPs: who adds to the residual stream, and who reads from it.

The stream that a layer reads is the sum of what was written before: the embedding, z_h W_O,h of
every earlier head, the output of every earlier MLP. An edge (u → v) is the path of u's contribution
straight into the input of v. Where a norm stands between heads and stream, a head's contribution is
what it writes with the norm's scale held (`writers`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

import numpy as np
import pandas as pd
import torch

from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Pairs
from interp.circuits.runs.writers import Writer, factor_of
from interp_hooks.activations import Activations
from interp_hooks.errors import TapError
from interp_hooks.head_weights import HeadWeights
from interp_hooks.norms import Norms

STREAM = ("pre", "mid", "post", "z")
#: largest difference, relative to the largest magnitude, between two ways to the same stream or
#: gradient
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
INSTEAD = "use head_ablation, attribution, hisp or discrete_sae, which need no edges"


@dataclass(frozen=True)
class Graph:
    """senders: "input", "L0H0", …, "MLP 0", "L1H0", … in the order in which they write; receivers:
    (name, kind), kind q, k, v, or "" for MLPs and the output. `rows[layer]` are a layer's heads
    among the senders, `mlp[layer]` its MLP; `columns[layer]` are a layer's receivers. `allowed`
    (senders, receivers): who is read by whom.

    With grouped keys a key-value head is one receiver, "L2KV1", since its query heads read the same
    keys and values.
    """

    senders: list[str]
    receivers: list[tuple[str, str]]
    rows: dict[int, slice]
    mlp: dict[int, int]
    columns: dict[int, slice]
    allowed: np.ndarray

    @classmethod
    def of(cls, runs: PairedRuns, parallel: bool, mlps: Mapping[int, bool]) -> Graph:
        """The graph of a model whose blocks are `parallel` or not; `mlps`: which layers have
        one."""
        senders = ["input"]
        receivers: list[tuple[str, str]] = []
        before: list[int] = []  # of each receiver: how many senders it can read
        rows, mlp, columns = {}, {}, {}
        for layer, site in runs.sites.items():
            start, first = len(receivers), len(senders)
            kv = "KV" if site.n_kv_heads < site.n_heads else "H"
            receivers += [(f"L{layer}H{h}", "q") for h in range(site.n_heads)]
            receivers += [
                (f"L{layer}{kv}{g}", kind) for kind in "kv" for g in range(site.n_kv_heads)
            ]
            rows[layer] = slice(first, first + site.n_heads)
            senders += [f"L{layer}H{h}" for h in range(site.n_heads)]
            before += [first] * (len(receivers) - start)
            if mlps[layer]:
                receivers.append((f"MLP {layer}", ""))
                before.append(first if parallel else len(senders))
                mlp[layer] = len(senders)
                senders.append(f"MLP {layer}")
            columns[layer] = slice(start, len(receivers))
        receivers.append(("output", ""))
        before.append(len(senders))
        allowed = np.arange(len(senders))[:, None] < np.array(before)[None]
        return cls(senders, receivers, rows, mlp, columns, allowed)

    @property
    def heads(self) -> np.ndarray:
        """(heads,): the rows of the heads among the senders, in the runs's order."""
        return np.concatenate([np.arange(part.start, part.stop) for part in self.rows.values()])

    def table(self, scores: np.ndarray, among: np.ndarray | None = None) -> pd.DataFrame:
        """The edges, or those `among` (senders, receivers), with their `scores` of that shape,
        strongest first."""
        u, v = np.nonzero(self.allowed if among is None else among)
        table = pd.DataFrame(
            dict(
                sender=[self.senders[i] for i in u],
                receiver=[self.receivers[i][0] for i in v],
                kind=[self.receivers[i][1] for i in v],
                score=scores[u, v].astype(np.float32),
            )
        )
        return table.iloc[np.argsort(-np.abs(scores[u, v]), kind="stable")].reset_index(drop=True)


class Stream:
    """The residual stream of a model as a sum over senders."""

    def __init__(self, runs: PairedRuns):
        self.runs, self.first, self.last = runs, runs.layers[0], runs.layers[-1]
        self.weights = {layer: _weights(runs, layer) for layer in runs.layers}
        self.writers = {layer: Writer(W) for layer, W in self.weights.items()}
        pairs = runs.batches(gradients=True)[0]
        _, activations = runs.run(pairs, keep=STREAM)
        self.parallel = ("mid", self.first) not in activations
        self.graph = Graph.of(runs, self.parallel, self._check_sum(activations, pairs.mask.bool()))

    def attention(self, layer: int, activations: Activations) -> torch.Tensor:
        """(batch, tokens, d_model): what the layer's heads write together, bias and norm
        included."""
        return self.writers[layer].written(activations["z", layer])

    @cached_property
    def norms(self) -> Norms:
        """The norms around each attention."""
        return self.runs.model.norms()

    @property
    def plain(self) -> bool:
        """Whether every head writes z_h W_O,h to the stream: no norm and no factor in between."""
        return all(writer.plain for writer in self.writers.values())

    def mlp(self, layer: int, activations: Activations) -> torch.Tensor:
        """(batch, tokens, d_model): what the layer's MLP writes."""
        if not self.parallel:
            return activations["post", layer] - activations["mid", layer]
        return (
            activations["post", layer]
            - activations["pre", layer]
            - self.attention(layer, activations)
        )

    def changes(
        self, clean: Activations, corrupted: Activations, among: slice = slice(None)
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows of the graph, (rows, batch, tokens, d_model): what these senders write, clean minus
        corrupted), a layer at a time; layers of which none is `among` those wanted are left out.

        Where a norm stands between heads and stream, both go through it with its scale at the clean
        run."""
        senders = range(len(self.graph.senders))[among]
        if 0 in senders:
            yield slice(0, 1), (clean["pre", self.first] - corrupted["pre", self.first])[None]
        for layer in self.runs.layers:
            if (
                self.graph.rows[layer].start not in senders
                and self.graph.mlp.get(layer) not in senders
            ):
                continue
            z, writer = clean["z", layer] - corrupted["z", layer], self.writers[layer]
            change = writer.result(z, writer.scale(clean["z", layer])).permute(
                2, 0, 1, 3
            )  # (heads, batch, tokens, d_model)
            rows = self.graph.rows[layer]
            if layer in self.graph.mlp:
                change = torch.cat(
                    [change, (self.mlp(layer, clean) - self.mlp(layer, corrupted))[None]]
                )
                rows = slice(rows.start, rows.stop + 1)
            yield rows, change

    @torch.no_grad()
    def _check_sum(self, activations: Activations, real: torch.Tensor) -> dict[int, bool]:
        """Which layers have an MLP. Raises `TapError` where the stream is not the sum of what heads
        and MLPs write."""
        mlps = {}
        for layer, following in zip(self.runs.layers, [*self.runs.layers[1:], None], strict=True):
            pre, post = activations["pre", layer][real], activations["post", layer][real]
            if following is not None and not near(post, activations["pre", following][real], post):
                self.refuse(
                    f"between layers {layer} and {following} something else writes to the residual "
                    "stream"
                )
            if self.parallel:
                rest = post - pre - self.attention(layer, activations)[real]
                mlps[layer] = not near(rest, torch.zeros_like(rest), post)
            else:
                self.writers[layer] = self._writer(
                    layer, activations["z", layer], pre, activations["mid", layer][real], real
                )
                mlps[layer] = True
        if self.parallel and any(mlps.values()):
            self._check_parallel()
        return mlps

    def _writer(
        self, layer: int, z: torch.Tensor, pre: torch.Tensor, mid: torch.Tensor, real: torch.Tensor
    ) -> Writer:
        """The one of a layer that takes the stream from `pre` to `mid` (tokens, d_model) at `real`
        (batch, tokens): by the sum of its heads, that through its norm, or a multiple."""
        weights, written = self.weights[layer], mid - pre
        # a stream with massive entries is rounded at their size
        close = CLOSE.get(mid.dtype, 2e-2) * written.abs().max()
        close = close + 8 * torch.finfo(mid.dtype).eps * mid.abs().amax(-1, keepdim=True)
        for base in (Writer(weights, self.norms.branch(layer)), Writer(weights)):
            factor = factor_of(written, base.written(z)[real])
            for writer in (base, replace(base, factor=factor)):
                if bool(((written - writer.written(z)[real]).abs() <= close).all()):
                    return writer
        self.refuse(
            f"layer {layer} does not add the sum of its heads' results to the residual stream, "
            "nor that through a norm or times a number"
        )

    def _check_parallel(self) -> None:
        """Without a stream between attention and MLP, what a layer writes must move with z by W_O
        and no more."""
        pairs = self.runs.batches(gradients=True)[0]
        _, activations = self.runs.live(pairs, keep=("post", "z"))
        draw = torch.Generator().manual_seed(0)
        for layer in self.runs.layers:
            post = activations["post", layer]
            probe = torch.randn(post.shape, generator=draw).to(post) * pairs.mask[..., None]
            (grad,) = torch.autograd.grad(post, activations["z", layer], probe, retain_graph=True)
            target = torch.einsum("bqm,hdm->bqhd", probe, self.weights[layer].W_O.to(probe))
            if not near(grad, target, target):
                self.refuse(
                    f"layer {layer} has neither a plain sequential block nor a parallel one"
                )

    def refuse(self, why: str) -> NoReturn:
        """Raise `TapError`: this model has no edges."""
        raise TapError(f"Edges of {self.runs.model.name} can't be told apart: {why}; {INSTEAD}.")


def detached(activations: Activations) -> Activations:
    """The same, cut from their graph."""
    return Activations({key: wire.detach() for key, wire in activations.items()})


def pair_runs(runs: PairedRuns, pairs: Pairs) -> tuple[Activations, Activations]:
    """The stream and z of a clean and a corrupted run."""
    return runs.run(pairs, keep=STREAM)[1], runs.run(pairs, corrupted=True, keep=STREAM)[1]


def _weights(runs: PairedRuns, layer: int) -> HeadWeights:
    return runs.model.head_weights(layer, runs.sites[layer].tower)


def near(a: torch.Tensor, b: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether a and b are equal up to rounding at the magnitude of `like`."""
    size = max(float(like.abs().max()), float(a.abs().max()), 1e-30) if a.numel() else 1.0
    return a.numel() == 0 or float((a - b).abs().max()) <= CLOSE.get(a.dtype, 2e-2) * size
