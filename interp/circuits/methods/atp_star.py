"""AtP*: attribution patching of queries, keys and values whose softmax is exact, with gradients of
which one layer after another is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.edges import Stream
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Pairs
from interp.errors import InputError, TapError
from interp_hooks.call import AttentionCall
from interp_hooks.edit import LiveEdit
from interp_kernels import attention

NODES = ("q", "k", "v", "z")
#: heads that the note names
NAMED = 8


@dataclass(frozen=True)
class AtPStar(Method):
    """score(h) = max over the head's nodes n of E_x [1/(L − 1) · Σ_ℓ |Σ (z_h − z_h(n := n(x'))) ·
    ∂m^ℓ/∂z_h|]; x' is the corrupted twin, L the number of layers.

    The nodes are a head's queries, its keys and values as it reads them, and z, each replaced at
    all positions at once. The QK fix: for queries and keys z is computed anew with the others as in
    the clean run, its softmax exact, so that a saturated softmax is no gradient of 0; only what
    follows z is of first order. GradDrop (`drop`): ∂m^ℓ leaves out what passes through attention
    and MLP of layer ℓ, one ℓ after another, so that a direct effect which an indirect one cancels
    is seen in some of them; L backwards. Without it ∂m is the gradient itself and the mean has one
    term.

    Here z is what attention gives before an output gate, where an architecture has one. `effect` is
    the plain first-order effect of z, `attribution`'s. A note names the nodes that decide.

    Raises `TapError` for TransformerLens models, which hold no rotated queries and keys to compute
    from, and where a layer does more than add to the stream.

    Misleads:
        The size is taken prompt by prompt and drop by drop, before any mean: a head that does
        nothing has a score above 0, and one that helps and hurts by turns a high one. Under grouped
        keys a key node is one query head's reading of them; no patch of the model does that.
    """

    nodes: tuple[str, ...] = NODES
    drop: bool = True

    name = "atp_star"
    title = "AtP*"
    summary = "attribution of q, k, v and z: exact softmax, gradients by layer dropped in turn"
    reading = (
        "How much the metric would change, by size, if the head's queries, keys, values or output "
        "were replaced: the node that matters most."
    )
    formula = "max_n E_x mean_ℓ |Σ (z_h − z_h(n := n(x'))) · ∂m^ℓ/∂z_h|, n in q, k, v, z"
    citation = "Kramár et al. 2024, arXiv 2403.00745, sections 3.1 and 3.2"
    unit = "metric"
    presets = {"qk": {"drop": False}, "keys": {"nodes": ("k",)}, "queries": {"nodes": ("q",)}}

    def __post_init__(self) -> None:
        given = self.nodes.split(",") if isinstance(self.nodes, str) else self.nodes
        object.__setattr__(self, "nodes", tuple(str(n).strip() for n in given))
        super().__post_init__()

    def check(self) -> None:
        if not self.nodes or not set(self.nodes) <= set(NODES):
            raise InputError(
                f"nodes of {self.name} are some of {', '.join(NODES)}, not {self.nodes!r}."
            )
        if not isinstance(self.drop, bool):
            raise InputError(f"drop of {self.name} is true or false, not {self.drop!r}.")

    def find(self, runs: PairedRuns) -> Found:
        Stream(runs)  # refuses layers that do more than add to the stream
        drops = list(runs.layers) if self.drop and len(runs.layers) > 1 else [None]
        batches = runs.batches(gradients=True)
        runs.expect(len(batches) * len(drops))
        sizes, signed = [], []  # of each batch: (nodes, heads, batch), (heads, batch)
        for pairs in batches:
            size, effect = self._batch(runs, pairs, drops)
            sizes.append(size)
            signed.append(effect)
        nodes, effects = np.concatenate(sizes, 2), np.concatenate(signed, 1)
        means = nodes.mean(2)  # (nodes, heads)
        best, number = means.argmax(0), np.arange(means.shape[1])
        chosen = nodes[best, number]  # (heads, n)
        n = chosen.shape[1]
        stderr = chosen.std(1, ddof=1) / np.sqrt(n) if n > 1 else None
        score = means.max(0)
        first = np.argsort(-score, kind="stable")[:NAMED]
        named = ", ".join(f"{runs.heads[i]} {self.nodes[best[i]]}" for i in first)
        notes = [f"AtP*: nodes that decide in the strongest heads: {named}."]
        return Found(score, effects.mean(1), stderr, effects=effects, notes=notes)

    def _batch(
        self, runs: PairedRuns, pairs: Pairs, drops: Sequence[int | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """((nodes, heads, batch) mean over the drops of |effect|, (heads, batch) effect of z)."""
        other, own = _Calls(), _Calls()
        with runs.model.edit(other):
            runs.run(pairs, corrupted=True)
        skips = Skips()
        with runs.model.edit(own):
            margins, _ = runs.live(pairs, (), write=skips.write)
        wires = [own.out[layer] for layer in runs.layers]
        with torch.no_grad():
            changes = [self._changes(own, other, layer) for layer in runs.layers]
        sizes: Any = 0
        for drop in drops:
            skips.dropped = drop
            slopes = torch.autograd.grad(margins.sum(), wires, retain_graph=True, allow_unused=True)
            if drop is not None and drop != drops[0]:
                runs.again(pairs)
            sizes = sizes + np.abs(_products(changes, slopes))
            runs.step(self.title)
        skips.dropped = None
        z = [(own.out[layer] - other.out[layer]).detach()[None] for layer in runs.layers]
        slopes = torch.autograd.grad(margins.sum(), wires, allow_unused=True)
        if drops != [None]:
            runs.again(pairs)
        return sizes / max(len(drops) - 1, 1), _products(z, slopes)[0]

    def _changes(self, own: _Calls, other: _Calls, layer: int) -> torch.Tensor:
        """(nodes, batch, tokens, heads, d): z minus z with each node replaced."""
        call, given = own.calls[layer], other.calls[layer]

        def anew(node: str) -> torch.Tensor:
            if node == "z":
                return other.out[layer]
            q = (given if node == "q" else call).query
            k = (given if node == "k" else call).key
            v = (given if node == "v" else call).value
            assert q is not None and k is not None
            return attention(q, k, v, **call.settings).out.transpose(1, 2)

        return torch.stack([own.out[layer].detach() - anew(node) for node in self.nodes])


def _products(changes: Sequence[torch.Tensor], slopes: Sequence[torch.Tensor | None]) -> np.ndarray:
    """(nodes, heads, batch) float64: Σ over positions and d of change · slope, layer by layer."""
    parts = []
    for change, slope in zip(changes, slopes, strict=True):
        each = torch.zeros_like(change[:, :, 0, :, 0], dtype=torch.float64)
        if slope is not None:
            each = (change.double() * slope.double()).sum((2, 4))
        parts.append(each.transpose(1, 2))
    return torch.cat(parts, 1).cpu().numpy()


class _Calls(LiveEdit):
    """Keeps each layer's attention call and what it gives, before an output gate."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}
        self.out: dict[int, torch.Tensor] = {}

    def touches(self, call: AttentionCall) -> bool:
        return call.site.is_main

    def attend(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        if call.query is None:
            raise TapError(
                "AtP* computes attention anew from queries and keys, which this TransformerLens "
                "model does not hold; load the HuggingFace model, or use attribution or relp."
            )
        layer = call.site.layer
        self.calls[layer], self.out[layer] = call, z.view_as(z)
        return self.out[layer]


class Skips:
    """A rewrite of the stream by which gradients pass around one layer, the `dropped` one, as if
    what its attention and MLP add were constant."""

    def __init__(self) -> None:
        self.dropped: int | None = None
        self._pre: dict[int, torch.Tensor] = {}

    def write(self, place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        if place == "pre":
            self._pre[layer] = tensor
        if place != "post":
            return None
        new: torch.Tensor = _Around.apply(self._pre.pop(layer), tensor, self, layer)
        return new


class _Around(torch.autograd.Function):
    """The stream after a layer; its gradient goes into the layer, or past it."""

    @staticmethod
    def forward(
        ctx: Any, pre: torch.Tensor, post: torch.Tensor, skips: Skips, layer: int
    ) -> torch.Tensor:
        ctx.skips, ctx.layer = skips, layer
        return post.view_as(post)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> Any:  # type: ignore[override]
        past = ctx.skips.dropped == ctx.layer
        return (slope, None, None, None) if past else (None, slope, None, None)
