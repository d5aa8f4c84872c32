"""The metric's gradient at every receiver's input, from runs with their graph, and its products
with what senders write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from interp.circuits.runs.edges import STREAM, Stream, near
from interp.circuits.runs.paired_runs import GRADIENT_TOKENS
from interp.circuits.runs.prompts import Pairs
from interp.streams.backward import Rules, ruled
from interp_hooks.activations import Activations, Hook
from interp_hooks.errors import TapError

#: memory for the gradients at all receivers of a batch
BYTES = 2**30


@dataclass(frozen=True)
class Live:
    """A clean run with its graph.

    margins: (batch,); activations: the stream, q, k, v, z; raw: queries, keys and values as the
    projections give them, (batch, tokens, heads, d_head), and normed: what the projections read,
    (batch, tokens, d_model), of layers that make them by a norm and a projection.
    """

    margins: torch.Tensor
    activations: Activations
    raw: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    normed: dict[int, torch.Tensor] = field(default_factory=dict)


class Slopes:
    """∂m/∂ the input of every receiver, through norm and projection of each head alone."""

    def __init__(self, stream: Stream):
        self.stream, self.graph, self.runs = stream, stream.graph, stream.runs
        self._weights = _projections(stream)
        self._checked = False

    def batches(self) -> list[Pairs]:
        """All prompts, in batches whose gradients fit."""
        model, graph = self.runs.model, self.graph
        width = self.stream.weights[self.stream.first].W_O
        each = len(graph.receivers) * width.shape[-1] * width.element_size()
        tokens = max(1, min(GRADIENT_TOKENS, BYTES // each))
        return self.runs.prompts.batches(model, tokens)

    def live(self, pairs: Pairs, write: Hook | None = None, rules: Rules | None = None) -> Live:
        """A clean run with its graph; the derivative is that of `rules`, if given."""
        raw: dict[tuple[str, int], torch.Tensor] = {}
        normed: dict[int, torch.Tensor] = {}

        def project(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
            if layer not in self._weights or not tensor.requires_grad:
                return None
            raw[place, layer] = tensor.view_as(tensor)
            return raw[place, layer]

        def norm(layer: int) -> Any:
            def hook(module: Any, args: tuple, out: torch.Tensor) -> torch.Tensor:
                normed[layer] = out.view_as(out)
                return normed[layer]

            return hook

        with ExitStack() as stack:
            if rules is not None:
                stack.enter_context(ruled(self.runs.model, rules))
            if self._weights:
                stack.enter_context(self.runs.model.projections(project))
            for layer in self._weights:
                before = self.stream.norms.attention(layer)
                if before is not None:
                    handle = before.module.register_forward_hook(norm(layer))
                    stack.callback(handle.remove)
            margins, activations = self.runs.live(pairs, ("q", "k", "v", *STREAM), write)
        return Live(margins, activations, raw, normed)

    def of(
        self, live: Live, among: slice = slice(None)
    ) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """(columns of the graph, [∂ Σ margins / ∂ input, (batch, tokens, d_model), of each]), a
        layer at a time from the output down to the last that reads senders `among` those wanted."""
        wires: dict[tuple[str, int], torch.Tensor] = {**live.activations}
        wires.update({(f"raw {place}", layer): w for (place, layer), w in live.raw.items()})
        wires = {key: wire for key, wire in wires.items() if key[0] != "z"}
        grads = torch.autograd.grad(
            live.margins.sum(), list(wires.values()), retain_graph=True, allow_unused=True
        )
        slope = {
            key: torch.zeros_like(wires[key]) if g is None else g
            for key, g in zip(wires, grads, strict=True)
        }
        last = len(self.graph.receivers)
        yield slice(last - 1, last), [slope["post", self.stream.last]]
        for layer in reversed(self.runs.layers):
            if not self.graph.allowed[among, self.graph.columns[layer]].any():
                return
            parts = [g for place in "qkv" for g in self._back(place, layer, live, slope)]
            if self.stream.parallel:
                rest = slope["pre", layer] - slope["post", layer] - sum(parts)
            else:
                rest = slope["mid", layer] - slope["post", layer]
                whole = slope["mid", layer] + sum(parts)
                if not self._checked and not near(slope["pre", layer], whole, whole):
                    self.stream.refuse(
                        f"layer {layer} is read by more than its queries, keys, values and MLP"
                    )
            if layer in self.graph.mlp:
                parts.append(rest)
            yield self.graph.columns[layer], parts
        self._checked = True

    def _back(
        self, place: str, layer: int, live: Live, slope: dict[tuple[str, int], torch.Tensor]
    ) -> list[torch.Tensor]:
        """∂m/∂ the stream that enters the layer through each head's queries (or keys, or values)
        alone, and nowhere further."""
        into = slope.get((f"raw {place}", layer))
        if into is None:
            return [
                self._alone(place, layer, live, slope, h)
                for h in range(slope[place, layer].shape[2])
            ]
        W = self._weights[layer][place]  # (heads, d_model, d_head)
        found = torch.einsum("bthd,hmd->hbtm", into, W.to(into)).unbind()
        if layer in live.normed:
            normed, pre = live.normed[layer], live.activations["pre", layer]
            found = tuple(
                torch.autograd.grad(normed, pre, one, retain_graph=True)[0] for one in found
            )
        if not self._checked:
            slow = self._alone(place, layer, live, slope, 0)
            if not near(found[0], slow, slow):
                self.stream.refuse(f"layer {layer} does not make its {place} by a projection")
        return list(found)

    def _alone(
        self,
        place: str,
        layer: int,
        live: Live,
        slope: dict[tuple[str, int], torch.Tensor],
        head: int,
    ) -> torch.Tensor:
        """The same of one head, by the run's own graph from its queries back to the stream."""
        alone = torch.zeros_like(slope[place, layer])
        alone[:, :, head] = slope[place, layer][:, :, head]
        wires = live.activations[place, layer], live.activations["pre", layer]
        (g,) = torch.autograd.grad(*wires, alone, retain_graph=True)
        return g


def products(
    slopes: Slopes,
    runs: Iterable[Live],
    clean: Activations,
    corrupted: Activations,
    scores: np.ndarray,
    among: slice = slice(None),
) -> None:
    """Add Σ over prompts, positions and d_model of (u clean − u corrupted) · Σ over `runs` of
    ∂m/∂input of v to `scores` (senders, receivers), at least for senders `among` those wanted."""
    stream, allowed = slopes.stream, slopes.graph.allowed
    total: torch.Tensor | None = None  # (receivers, batch, tokens, d_model)
    for live in runs:
        for columns, parts in slopes.of(live, among):
            if total is None:
                total = torch.zeros(allowed.shape[1], *parts[0].shape).to(parts[0])
            for column, part in zip(range(columns.start, columns.stop), parts, strict=True):
                total[column] += part.detach()
    if total is None:
        return
    with torch.no_grad():
        for rows, change in stream.changes(clean, corrupted, among):
            first = int(allowed[rows].any(0).argmax())  # receivers come in the order of layers
            product = change.flatten(1) @ total[first:].flatten(1).T
            scores[rows, first:] += product.double().cpu().numpy() * allowed[rows, first:]


def _projections(stream: Stream) -> dict[int, dict[str, torch.Tensor]]:
    """layer → place → (heads, d_model, d_head), of layers whose queries, keys and values are a norm
    and a projection of the stream, head by head; the others' are gone back through one by one."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    try:
        with stream.runs.model.projections(lambda place, layer, tensor: None):
            pass
    except TapError:
        return {}
    for layer, W in stream.weights.items():
        site = stream.runs.sites[layer]
        step = site.n_heads // site.n_kv_heads  # keys and values are repeated for their readers
        try:
            stream.norms.attention(layer)
            if not W.normed:
                found[layer] = {"q": W.W_Q, "k": W.W_K[::step], "v": W.W_V[::step]}
        except TapError:
            continue
    return found
