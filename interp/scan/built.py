"""Who built the scores of many heads, each from one query to one key: sides of the table of
`mechanics.qk_attribution`, all heads of a text in one forward.

q·k with k held is linear in the query's stream, and the other way round. One step back from the
call to the projections (or the norms behind them, which are held) gives the direction that a head's
query is read in, for all heads of a layer at once; a writer's part is a product with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import TapError
from interp.inputs.forward import forward
from interp.results.evidence import Built
from interp.streams.qk import CLOSE
from interp.streams.score_maps import Seen, Way, frozen_norm, norm_of, vector_at, watching
from interp.streams.writers import back, main_sites, written
from interp_hooks.question import Question, SiteQuestion

if TYPE_CHECKING:
    from interp_hooks.call import Site
    from interp_hooks.head_weights import HeadWeights
    from interp_hooks.model import HookedModel

#: writers that are kept of each side
KEPT = 3
#: bytes of W_O in float64 that are kept from text to text
MOST = 1 << 30


@dataclass(frozen=True)
class Edge:
    """From a query to a key, both places in one text, of a head's number in its layer."""

    head: int
    query: int
    key: int


@dataclass
class _Side:
    """The directions in which one side's projections are read: (edges, d_head) float64, constants
    (edges,), and q·k (edges,) with ‖q‖‖k‖."""

    direction: torch.Tensor
    constant: torch.Tensor
    score: torch.Tensor
    size: torch.Tensor


class Weights:
    """Norms and head weights of a model, read once for several texts."""

    def __init__(self, model: HookedModel):
        self.sites, self.norms = main_sites(model), model.norms()
        self._of = {s.layer: model.head_weights(s.layer, s.tower) for s in self.sites}
        self._wide: dict[int, torch.Tensor] = {}
        numbers = sum(w.W_O.numel() for w in self._of.values())
        self._keeps = 8 * numbers <= MOST  # in float64

    def of(self, layer: int) -> HeadWeights:
        return self._of[layer]

    def W_O(self, layer: int) -> torch.Tensor:
        """(heads, d_head, d_model) float64."""
        found = self._wide.get(layer)
        if found is None:
            found = self._of[layer].W_O.double()
            if self._keeps:
                self._wide[layer] = found
        return found


def built_of(
    model: HookedModel,
    row: Sequence[int],
    edges: Mapping[Site, Sequence[Edge]],
    weights: Weights | None = None,
) -> dict[Site, list[Built]]:
    """Who built the scores of these edges in one text. Raises `TapError` where they can't be split,
    as `mechanics.qk_attribution`."""
    known = Weights(model) if weights is None else weights
    run = _Run(model, edges)
    run.go(torch.tensor([list(row)], device=model.device))
    ends = [0, len(row) - 1]  # the stream is held against its parts at two places
    written(model, known.norms, known.sites[: len(run.z)],
            {k: v[ends].double() for k, v in run.stream.items()},
            {k: v[ends] for k, v in run.z.items()})  # fmt: skip
    return {site: _built(model, known, run, site) for site in edges if edges[site]}


class _Run:
    """One forward: the stream (place, layer) → (tokens, d_model), z, and both sides of each layer
    with edges."""

    def __init__(self, model: HookedModel, edges: Mapping[Site, Sequence[Edge]]):
        self.model, self.edges = model, {s: list(e) for s, e in edges.items() if e}
        self.ways = {site: Way(site.layer) for site in self.edges}
        self.sites = {site.layer: site for site in self.edges}
        self.stream: dict[tuple[str, int], torch.Tensor] = {}
        self.z: dict[int, torch.Tensor] = {}
        self.sides: dict[tuple[int, str], _Side] = {}
        self.scaling: dict[int, float] = {}

    def go(self, ids: torch.Tensor) -> None:
        def note(stats: Any) -> None:
            if stats.site in self.edges:
                if stats.call.query is None or stats.call.n_keys != ids.shape[1]:
                    raise TapError(
                        f"{self.model.name} shows its queries before rotation, or attends to more "
                        "than the text."
                    )
                self.scaling[stats.site.layer] = stats.call.scaling

        question = SiteQuestion(call=True, choose=lambda site: Question(call=True))
        with watching(self.model, self.ways), self.model.activations(write=self._keep), \
                self.model.watch(question, note, "after"):  # fmt: skip
            forward(self.model, ids, keep=1)

    def _keep(self, place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        if place in ("pre", "mid", "post"):
            if tensor.ndim != 3 or len(tensor) != 1:
                raise TapError(f"Its residual stream is {tuple(tensor.shape)}.")
            self.stream[place, layer] = tensor[0].detach()
        elif place == "z":
            self.z[layer] = tensor[0].detach()
        elif place in "qk" and layer in self.sites:
            site = self.sites[layer]
            way = self.ways[site]
            out = way.at_call(place, layer, tensor)
            if place == "k":
                with torch.enable_grad():
                    self._sides(site, way)
                way.places = {"q": Seen(), "k": Seen()}  # with their graph
            return out
        return None

    def _sides(self, site: Site, way: Way) -> None:
        """Both sides of a layer's edges, from the way of its queries and keys."""
        q, k = way.places["q"].called, way.places["k"].called  # (1, tokens, heads, d_head)
        edges = self.edges[site]
        if q is None or k is None:
            raise TapError(f"Queries and keys of layer {site.layer} were not seen.")
        own = [e.head * k.shape[2] // q.shape[2] for e in edges]
        by_q = torch.stack([q[0, e.query, e.head] for e in edges])  # (edges, d_head)
        by_k = torch.stack([k[0, e.key, g] for e, g in zip(edges, own, strict=True)])
        for place, mine, other, at, heads in (
            ("q", by_q, by_k, [e.query for e in edges], [e.head for e in edges]),
            ("k", by_k, by_q, [e.key for e in edges], own),
        ):
            self.sides[site.layer, place] = self._side(way, place, mine, other.detach(), at, heads)

    def _side(
        self,
        way: Way,
        place: str,
        mine: torch.Tensor,
        other: torch.Tensor,
        at: Sequence[int],
        heads: Sequence[int],
    ) -> _Side:
        seen = way.places[place]
        if seen.projected is None:
            raise TapError(f"The projections of layer {way.layer} were not seen.")
        norm = norm_of(self.model, way, seen)
        start, layout = (seen.projected, "tokens") if norm is None else (seen.left, seen.layout)
        assert start is not None
        score = (mine * other).sum(1)  # (edges,)
        found: dict[int, torch.Tensor] = {}
        for turn in _apart(list(zip(at, heads, strict=True))):  # no two of one place in a step
            (slope,) = torch.autograd.grad(
                score[turn].sum(), start, retain_graph=True, allow_unused=True
            )
            if slope is None:
                raise TapError(f"Layer {way.layer} takes another way than by its projections.")
            for i in turn:
                found[i] = vector_at(slope, layout, seen, at[i], heads[i]).double()
        direction, constant = [], []
        for i, (position, head) in enumerate(zip(at, heads, strict=True)):
            slope = found[i]
            if norm is None:
                direction.append(slope)
                constant.append(slope.new_zeros(()))
            else:
                held = frozen_norm(norm, seen, position, head)
                direction.append(held.matrix @ slope)
                constant.append(held.offset @ slope)
        size = mine.detach().double().norm(dim=1) * other.double().norm(dim=1)
        return _Side(torch.stack(direction), torch.stack(constant), score.detach().double(), size)


def _apart(places: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Numbers of places in groups in which none is there twice."""
    groups: list[list[int]] = []
    for i, place in enumerate(places):
        free = (g for g in groups if all(places[j] != place for j in g))
        group = next(free, None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    return groups


@torch.no_grad()
def _built(model: HookedModel, known: Weights, run: _Run, site: Site) -> list[Built]:
    """Of the edges of one layer."""
    scaling, edges = run.scaling[site.layer], run.edges[site]
    sides = []
    for place in "qk":
        at = [e.query if place == "q" else e.key for e in edges]
        sides.append(_parts(model, known, run, site, place, at))
    scores = (scaling * run.sides[site.layer, "q"].score).tolist()
    found = []
    for i, score in enumerate(scores):
        query, key = (
            tuple(
                (names[j], scaling * float(values[i, j]))
                for j in values[i].abs().argsort(descending=True)[:KEPT].tolist()
                if bool(values[i, j])  # biases that are not there
            )
            for names, values in sides
        )
        found.append(Built(score, query, key))
    return found


def _parts(
    model: HookedModel, known: Weights, run: _Run, site: Site, place: str, at: Sequence[int]
) -> tuple[list[str], torch.Tensor]:
    """Names of the writers and (edges, writers) what each adds to q·k by one side's stream."""
    side, own = run.sides[site.layer, place], known.of(site.layer)
    W, b = (own.W_Q, own.b_Q) if place == "q" else (own.W_K, own.b_K)
    heads = [e.head for e in run.edges[site]]
    reads = torch.einsum("hmd,hd->hm", W[heads].double(), side.direction)  # (edges, d_model)
    constant = side.constant.clone()
    if b is not None:
        constant += (b[heads].double() * side.direction).sum(1)
    before = known.norms.attention(site.layer)
    if before is not None:
        held = before.frozen(run.stream["pre", site.layer][at])
        constant += reads @ held.bias
        reads = back(held, reads)

    def stream(where: str, layer: int) -> torch.Tensor:
        return (run.stream[where, layer][at].double() * reads).sum(1)

    earlier = [s for s in known.sites if s.layer < site.layer]
    first = (earlier or [site])[0].layer
    names = ["embedding" if first == 0 else f"before layer {first}"]
    parts = [stream("pre", first)]
    for other in earlier:
        by_head, bias = _heads(model, known, other, run.z[other.layer][at], reads)
        rest = stream("post", other.layer) - stream("pre", other.layer) - by_head.sum(1) - bias
        names += [f"L{other.layer}H{h}" for h in range(other.n_heads)]
        names += [f"b_O {other.layer}", f"MLP {other.layer}"]
        parts += [*by_head.unbind(1), bias, rest]
    names, parts = [*names, "bias"], [*parts, constant]
    values = torch.stack(parts, 1)  # (edges, writers)
    most = CLOSE.get(run.stream["pre", first].dtype, 2e-2) * side.size.clamp_min(1e-30)
    if not bool(((values.sum(1) - side.score).abs() <= most).all()):
        raise TapError(f"The writers of layer {site.layer} do not add up to its scores.")
    return names, values


def _heads(
    model: HookedModel, known: Weights, site: Site, z: torch.Tensor, reads: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(edges, heads) and (edges,): what a layer's heads and biases add along `reads` (edges,
    d_model); z (edges, heads, d_head)."""
    W_O, b_O = known.W_O(site.layer), known.of(site.layer).b_O
    after = known.norms.branch(site.layer)
    bias = reads.new_zeros(len(reads))
    if after is not None:
        whole = z.double().flatten(1) @ W_O.flatten(0, 1)
        whole = whole if b_O is None else whole + b_O.double()
        held = after.frozen(whole.to(next(model.module.parameters()).dtype))
        bias, reads = reads @ held.bias, back(held, reads)
    if b_O is not None:
        bias = bias + reads @ b_O.double()
    # (edges, heads · d_head): one product, no (edges, heads, d_model)
    toward = (reads @ W_O.flatten(0, 1).T).view(z.shape)
    return (z.double() * toward).sum(2), bias
