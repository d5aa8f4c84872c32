"""A model of which some edges carry something else: what a sender wrote in the corrupted run, or
nothing."""

from __future__ import annotations

from typing import Any

import torch

from interp.circuits.runs.edges import STREAM, Stream
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Pairs
from interp_hooks.activations import Activations
from interp_hooks.errors import TapError
from interp_hooks.norms import CLOSE

#: what a removed edge carries: the sender's output in the corrupted twin, or 0
MODES = ("resample", "zero")


class Receivers:
    """How each head's queries, keys and values come from the stream that it reads: norm, then its
    own projection."""

    def __init__(self, runs: PairedRuns, stream: Stream):
        self.runs, norms = runs, runs.model.norms()
        self.norm: dict[int, torch.nn.Module | None] = {}
        self.weights: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor | None]] = {}
        for layer, site in runs.sites.items():
            norm, W = norms.attention(layer), stream.weights[layer]
            self.norm[layer] = None if norm is None else norm.module
            step = (
                site.n_heads // site.n_kv_heads
            )  # keys and values are repeated for each query head that reads them
            self.weights["q", layer] = W.W_Q, W.b_Q
            self.weights["k", layer] = W.W_K[::step], None if W.b_K is None else W.b_K[::step]
            self.weights["v", layer] = W.W_V[::step], None if W.b_V is None else W.b_V[::step]
        self._check()

    def project(self, place: str, layer: int, head: int, stream: torch.Tensor) -> torch.Tensor:
        """(…, d_head): one head's queries, keys or values where it reads `stream` (…, d_model)."""
        norm, (W, b) = self.norm[layer], self.weights[place, layer]
        projection = (stream if norm is None else norm(stream)) @ W[head].to(stream)
        return projection if b is None else projection + b[head].to(stream)

    @torch.no_grad()
    def _check(self) -> None:
        """Raise `TapError` where these are not the model's own queries, keys and values."""
        pairs, own = self.runs.batches()[0], {}
        with self.runs.model.projections(
            lambda place, layer, tensor: own.update({(place, layer): tensor})
        ):
            _, activations = self.runs.run(pairs, keep=("pre",))
        for (place, layer), tensor in own.items():
            heads = range(tensor.shape[2])
            projections = torch.stack(
                [self.project(place, layer, h, activations["pre", layer]) for h in heads], 2
            )
            size = float(tensor.abs().max())
            if not float((projections - tensor).abs().max()) <= 10 * CLOSE.get(
                tensor.dtype, 2e-2
            ) * max(size, 1e-30):
                raise TapError(
                    f"Layer {layer} of {self.runs.model.name} does not make its {place} from the "
                    "stream by a norm and "
                    "a projection, so edges into it can't be patched; use head_ablation, "
                    "attribution, eap or "
                    "discrete_sae."
                )


class Subgraph:
    """Some prompts run through a model with edges removed: the input of receiver v is

        stream + Σ over removed (u → v) of (stand-in of u − u as it is in this run)

    and everything after follows. Where a norm stands between a layer's heads and the stream, v
    reads what the norm gives for the heads with those replaced whose edge into v is removed: the
    norm is taken anew, and nothing is held. `logits` runs several such models side by side.
    """

    def __init__(self, stream: Stream, receivers: Receivers, pairs: Pairs, mode: str):
        self.stream, self.graph, self.receivers, self.pairs = stream, stream.graph, receivers, pairs
        self.runs = runs = stream.runs
        with torch.no_grad():
            with runs.model.block_outputs() as blocks:
                _, self.clean = runs.run(pairs, keep=STREAM)
            self._blocks: dict[int, Any] = blocks
            _, corrupted = runs.run(pairs, corrupted=True, keep=STREAM)
            if mode == "zero":
                corrupted = Activations(
                    {key: torch.zeros_like(wire) for key, wire in corrupted.items()}
                )
            #: what stands in for z (batch, tokens, heads, d_head) and for each MLP's output (batch,
            #: tokens, d_model)
            self.z = {layer: corrupted["z", layer] for layer in self.graph.rows}
            self.mlps = {
                layer: stream.mlp(layer, corrupted) * (mode != "zero") for layer in self.graph.mlp
            }
            #: layers with a norm between heads and stream: what goes into it in the clean run
            self.totals: dict[int, torch.Tensor] = {}
            #: (senders, batch, tokens, d_model): stand-in minus what the clean run has; of heads
            #: before such a norm
            self.changes = self._changes(corrupted)

    def _changes(self, corrupted: Activations) -> torch.Tensor:
        changes = [corrupted["pre", self.stream.first] - self.clean["pre", self.stream.first]]
        for layer, writer in self.stream.writers.items():
            z = self.clean["z", layer]
            changes += writer.raw(self.z[layer] - z).unbind(2)
            if writer.norm is not None:
                self.totals[layer] = writer.total(z)
            if layer in self.mlps:
                changes.append(self.mlps[layer] - self.stream.mlp(layer, self.clean))
        return torch.stack(changes)

    @torch.no_grad()
    def logits(self, removed: torch.Tensor, start: int) -> torch.Tensor:
        """(models, batch, last slots, vocabulary). `removed` (models, senders, receivers), 1 where
        an edge is removed; none may be into a receiver of a layer before `start`, which are not run
        again."""
        return self.live(removed, start)

    def live(self, removed: torch.Tensor, start: int) -> torch.Tensor:
        """The same with its graph; `removed` may be anything from 0 to 1, and gradients flow to
        it."""
        models = len(removed)
        run = _Run(self, removed.to(self.changes), start)
        before = None if start == self.stream.first else _copied(self._blocks[start - 1], models)
        with self.runs.model.resume(start, before), self.runs.model.projections(run.project):
            out, _ = self.runs.logits(self.pairs, self.pairs.clean, run.write, copies=models)
        return out.reshape(models, len(self.pairs.rows), *out.shape[1:])


class _Run:
    """What one forward of several models knows so far."""

    def __init__(self, sub: Subgraph, removed: torch.Tensor, start: int):
        self.sub, self.removed, self.start = sub, removed, start
        self.graph, self.stream = sub.graph, sub.stream
        self.changes: list[
            torch.Tensor
        ] = []  # of senders from layer `start` on: (models, senders, batch, tokens, d)
        self.first = self.graph.rows[start].start  # their first number
        self.here: dict[str, torch.Tensor] = {}  # pre, mid and z of the layer that runs now
        self.added: torch.Tensor | None = None  # to the input of its MLP
        #: layers with a norm after their heads: (change of each head before it (models, heads,
        #: batch, tokens, d), what goes into it (models, batch, tokens, d))
        self.normed = {
            layer: (sub.changes[self.graph.rows[layer]][None], total[None])
            for layer, total in sub.totals.items()
            if layer < start
        }

    def into(self, receiver: int) -> torch.Tensor | None:
        """(models · batch, tokens, d_model): what removed edges into a receiver add to its input;
        None without any."""
        removed = self.removed[:, :, receiver]  # (models, senders)
        if not removed.any():
            return None
        plain = removed
        if self.sub.totals:  # what passes a norm is no sum
            plain = removed.clone()
            for layer in self.sub.totals:
                plain[:, self.graph.rows[layer]] = 0
        changes = self.sub.changes[: self.first]
        total = torch.einsum("ms,sbtd->mbtd", plain[:, : self.first], changes)
        start = self.first
        for change in self.changes:
            part = plain[:, start : start + change.shape[1]]
            if part.any():
                total = total + torch.einsum("ms,msbtd->mbtd", part, change)
            start += change.shape[1]
        for layer, (change, before) in self.normed.items():
            part = removed[:, self.graph.rows[layer]]
            if part.any():
                writer = self.stream.writers[layer]
                change = change.expand(len(part), *change.shape[1:])
                after = before + torch.einsum("ms,msbtd->mbtd", part, change)
                total = total + (writer.passed(after) - writer.passed(before))
        return total.flatten(0, 1)

    def project(self, place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        """Queries, keys, values (models · batch, tokens, heads, d_head) from each head's own
        input."""
        if layer < self.start:
            return None
        first = self.graph.columns[layer].start
        site = self.sub.runs.sites[layer]
        first += {"q": 0, "k": site.n_heads, "v": site.n_heads + site.n_kv_heads}[place]
        new = None
        for head in range(tensor.shape[2]):
            added = self.into(first + head)
            if (
                added is not None or self.added is not None
            ):  # in parallel blocks, the MLP's input is in the stream
                stream = self.here["pre"] if added is None else self.here["pre"] + added
                new = tensor.clone() if new is None else new
                new[:, :, head] = self.sub.receivers.project(place, layer, head, stream)
        return new

    def write(self, place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        if layer < self.start or place not in ("pre", "mid", "post", "z"):
            return None
        return getattr(self, place + "_")(layer, tensor)

    def pre_(self, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        self.here, self.added = {"pre": tensor}, None
        return self._mlp_input(layer, tensor) if self.stream.parallel else None

    def mid_(self, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        self.here["mid"] = tensor
        return self._mlp_input(layer, tensor)

    def _mlp_input(self, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        """What is added here passes on around the MLP too, and is taken off after the block."""
        if layer in self.graph.mlp:
            self.added = self.into(self.graph.columns[layer].stop - 1)
        return None if self.added is None else tensor + self.added

    def z_(self, layer: int, tensor: torch.Tensor) -> None:
        self.here["z"] = tensor
        change = self._against(self.sub.z[layer], tensor)
        writer = self.stream.writers[layer]
        result = writer.raw(change)  # (models · batch, tokens, heads, d_model)
        self._note(result.transpose(1, 2))
        if writer.norm is not None:
            total = writer.total(tensor).unflatten(0, (-1, len(self.sub.pairs.rows)))
            self.normed[layer] = (self.changes[-1], total)

    def post_(self, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        new = tensor if self.added is None else tensor - self.added
        if layer in self.graph.mlp:
            if self.stream.parallel:
                attention = self.stream.attention(
                    layer, Activations({("z", layer): self.here["z"]})
                )
                written = new - self.here["pre"] - attention
            else:
                written = new - self.here["mid"]
            self._note(self._against(self.sub.mlps[layer], written)[:, None])
        if layer == self.stream.last:
            added = self.into(len(self.graph.receivers) - 1)
            new = new if added is None else new + added
        return None if new is tensor else new

    def _against(self, stand_in: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """`stand_in` (batch, …), the same for all models, minus `tensor` (models · batch, …)."""
        return (stand_in - tensor.unflatten(0, (-1, len(stand_in)))).flatten(0, 1)

    def _note(self, change: torch.Tensor) -> None:
        """(models · batch, senders, tokens, d_model) of a layer's heads or its MLP."""
        self.changes.append(change.unflatten(0, (-1, len(self.sub.pairs.rows))).transpose(1, 2))


def _copied(output: Any, copies: int) -> Any:
    """A block's output for a batch `copies` times over."""
    if isinstance(output, tuple):
        return tuple(_copied(part, copies) for part in output)
    return (
        output.repeat(copies, *[1] * (output.ndim - 1))
        if isinstance(output, torch.Tensor)
        else output
    )
