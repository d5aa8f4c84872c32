"""What lies behind a scan's numbers: where in its texts each head does most, what it writes, and
with whom it composes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interp.errors import TapError
from interp.inputs.forward import forward
from interp.inputs.pieces import pieces
from interp.mechanics.composition import scores_of
from interp.mechanics.ov_directions import extremes, ov_directions
from interp.mechanics.weights import main_sites
from interp.results.evidence import Evidence, HeadEvidence, Partner, Passage, Writes
from interp.scan.built import Edge, Weights, built_of
from interp_hooks.heads import Head
from interp_hooks.question import Question, SiteQuestion
from interp_hooks.weight_rows import WeightRows

if TYPE_CHECKING:
    from interp.inputs.pace import Pace
    from interp.probes.settings import Settings
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.model import HookedModel
    from interp_hooks.recording import LayerStats

#: texts that passages are looked for in, and tokens of each, at most
TEXTS, LENGTH = 4, 384
#: passages of a head that are kept, and places that are looked at for them in each text
KEPT, LOOKED_AT = 5, 24
#: partners that are kept of each kind, on each side
PARTNERS = 2
#: tokens of a passage before its first and after its last marked token, and between them
BEFORE, AFTER, BETWEEN = 10, 5, 24
#: what comparing heads may take, in multiplications and additions, and how many a second a slow CPU
#: does
MOST, PACE = 2e12, 2e10


@dataclass(frozen=True)
class _Place:
    """A query that looks at a key in one text, and the head's output at the query (d_head,)."""

    sample: int
    query: int
    key: int
    weight: float
    moves: float
    z: torch.Tensor


@torch.no_grad()
def evidence_of(
    model: HookedModel, settings: Settings, within: Callable[[float], None] = lambda share: None
) -> Evidence:
    """Passages, OV directions and partners of every head of the main tower; `within` is told which
    share is done."""
    rows = settings.rows(model.tokenizer, min(LENGTH, settings.context))[:TEXTS]
    sites = main_sites(model)
    notes: list[str] = []
    heads = {
        str(Head(s.layer, h, s.tower)): HeadEvidence() for s in sites for h in range(s.n_heads)
    }
    places: dict[str, list[_Place]] = {name: [] for name in heads}
    for sample, row in enumerate(rows):
        for name, found in _places(model, sites, sample, row).items():
            places[name] += found
        within(0.5 * (sample + 1) / len(rows))
    texts = [pieces(model.tokenizer, row) for row in rows]
    chosen = {site: [_chosen(places[name], texts) for name in _names(site)] for site in sites}
    promoted = _raised(model, chosen, notes)
    within(0.65)
    strongest: dict[Site, list[_Place | None]] = {}
    for site, by_head in chosen.items():
        strongest[site] = [max(some, key=lambda p: p.weight, default=None) for some in by_head]
        for name, some in zip(_names(site), by_head, strict=True):
            heads[name].passages = [
                _passage(p, texts[p.sample], next(promoted[site])) for p in some
            ]
    _add_built(model, rows, strongest, heads, notes)
    within(0.7)
    _add_writes(model, heads, notes)
    within(0.85)
    _add_partners(model, heads, notes)
    return Evidence(heads, dict(texts=len(rows), tokens=max(map(len, rows))), notes)


def seconds(model: HookedModel, settings: Settings, pace: Pace) -> float:
    """How long `evidence_of` takes, about: forwards with all weights looked at, and the products of
    matrices."""
    length, texts = min(LENGTH, settings.context), min(TEXTS, settings.samples)
    products = comparing(model.n_heads, model.n_layers, model.d_head)
    return 6 * texts * pace.plain(1, length) + products / PACE + 0.1 * model.n_layers


def comparing(heads: int, layers: int, d_head: int) -> float:
    """Multiplications and additions that comparing all pairs of heads takes; none where that is too
    much and left out."""
    cost = 3.0 * (heads * layers) ** 2 * d_head**2 * heads * d_head
    return cost if cost <= MOST else 0.0


def _names(site: Site) -> list[str]:
    return [str(Head(site.layer, h, site.tower)) for h in range(site.n_heads)]


def _places(
    model: HookedModel, sites: Sequence[Site], sample: int, row: list[int]
) -> dict[str, list[_Place]]:
    """head → its candidates in one text, those that move the stream most; the first token as a key
    is left out, since a weight on it says little."""
    found: dict[str, list[_Place]] = {}
    pending: dict[Site, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
    mine = set(sites)
    gram: dict[Site, torch.Tensor | None] = {}

    def take(call: AttentionCall, start: int, a: torch.Tensor) -> None:
        a = a[0]  # (heads, rows, columns)
        n_heads, n_rows, columns = a.shape
        if call.site not in gram:
            gram[call.site] = _norms(model, call, n_heads)
        moves = a * gram[call.site][:, None, :columns]  # type: ignore[index]
        moves[:, :, 0] = 0
        most, key = moves.max(2)  # (heads, rows): a key of each query
        top, query = most.topk(min(LOOKED_AT, n_rows), 1)
        key = key.gather(1, query)
        weights = a.flatten(1).gather(1, query * columns + key)
        pending.setdefault(call.site, []).append((query + start, key, weights, top))

    def add(stats: LayerStats) -> None:
        if stats.site not in pending or stats.z is None:
            return
        parts = pending.pop(stats.site)
        gram.pop(stats.site)
        query, key, weight, moves = (torch.cat([p[i] for p in parts], 1) for i in range(4))
        for h, name in enumerate(_names(stats.site)):
            z = stats.z[0, query[h], h].float()  # (places, d_head)
            numbers = (x[h].tolist() for x in (query, key, weight, moves))
            found[name] = [
                _Place(sample, q, k, w, m, z[i])
                for i, (q, k, w, m) in enumerate(zip(*numbers, strict=True))
                if m > 0
            ]

    asked = Question(z=True, weights=WeightRows(take))
    silent = Question()
    question = SiteQuestion(z=True, choose=lambda site: asked if site in mine else silent)
    with model.watch(question, add):
        forward(model, torch.tensor([row]), keep=1)
    return found


def _norms(model: HookedModel, call: AttentionCall, n_heads: int) -> torch.Tensor:
    """(heads, keys) ‖v_k W_O‖ of each head; ‖v_k‖ where W_O is not known."""
    value = call.value[0].float()  # (kv_heads, keys, d)
    value = value.repeat_interleave(n_heads // value.shape[0], 0)
    try:
        W_O = model.head_weights(call.site.layer, call.site.tower).W_O.to(value)
    except TapError:
        return value.norm(dim=-1)
    square = W_O @ W_O.transpose(1, 2)  # (heads, d, d)
    return ((value @ square) * value).sum(-1).clamp_min(0).sqrt()


def _chosen(found: list[_Place], texts: Sequence[Sequence[str]]) -> list[_Place]:
    """The strongest places, no two of the same pair of words or beside each other."""
    kept: list[_Place] = []
    words: set[tuple[str, str]] = set()
    for place in sorted(found, key=lambda p: -p.moves):
        text = texts[place.sample]
        pair = text[place.query].strip().lower(), text[place.key].strip().lower()
        near = any(p.sample == place.sample and abs(p.query - place.query) < 6 for p in kept)
        if pair in words or near:
            continue
        kept.append(place)
        words.add(pair)
        if len(kept) == KEPT:
            break
    return kept


def _passage(place: _Place, text: Sequence[str], promotes: tuple[str, ...]) -> Passage:
    low, high = sorted((place.key, place.query))
    roles = {place.key: "key", place.query: "query"} if low < high else {low: "both"}
    first, last = max(0, low - BEFORE), min(len(text), high + 1 + AFTER)
    parts = [("…" if first else "", ""), ("".join(text[first:low]), ""), (text[low], roles[low])]
    if low < high:
        between = list(text[low + 1 : high])
        if len(between) > BETWEEN:
            between = [*between[:AFTER], " … ", *between[-BEFORE:]]
        parts += [("".join(between), ""), (text[high], roles[high])]
    parts.append(("".join(text[high + 1 : last]), ""))
    said = tuple((t, role) for t, role in parts if t)
    return Passage(
        place.sample, place.query, place.key, place.weight, place.moves, said, promotes
    )  # fmt: skip


def _raised(
    model: HookedModel, chosen: Mapping[Site, list[list[_Place]]], notes: list[str], n: int = 3
) -> dict[Site, Iterator[tuple[str, ...]]]:
    """For the places of each layer's heads in turn, the tokens whose logits the head's output there
    raises most; none where the model's weights don't tell."""
    said: dict[Site, Iterator[tuple[str, ...]]] = {
        site: iter([() for some in by for _ in some]) for site, by in chosen.items()
    }
    try:
        vocabulary, last = model.vocabulary(), model.norms().final()
    except TapError as reason:
        notes.append(f"What heads promote is left out: {reason}")
        return said
    writes: dict[Site, torch.Tensor] = {}
    for site, by_head in chosen.items():
        try:
            W_O = model.head_weights(site.layer, site.tower).W_O.float()
        except TapError:
            continue
        if any(by_head):
            write = torch.stack([p.z @ W_O[h] for h, some in enumerate(by_head) for p in some])
            if last is not None:
                write = (last.centred(write.double()) * last.gain).float()
            writes[site] = write  # (places, d_model)
    if writes:
        (ids, _), _ = extremes(torch.cat(list(writes.values())), vocabulary.W_U, n)
        for site, some in zip(writes, ids.split([len(w) for w in writes.values()]), strict=True):
            tokens = [tuple(pieces(model.tokenizer, [i])[0] for i in row) for row in some.tolist()]
            said[site] = iter(tokens)
    return said


def _add_built(
    model: HookedModel,
    rows: Sequence[Sequence[int]],
    strongest: Mapping[Site, Sequence[_Place | None]],
    heads: dict[str, HeadEvidence],
    notes: list[str],
) -> None:
    """Who built the score of each head's strongest passage; one forward a text."""
    try:
        weights = Weights(model)
        for sample, row in enumerate(rows):
            edges = {
                site: [
                    Edge(h, p.query, p.key)
                    for h, p in enumerate(some)
                    if p is not None and p.sample == sample
                ]
                for site, some in strongest.items()
            }
            if any(edges.values()):
                for site, found in built_of(model, row, edges, weights).items():
                    for edge, one in zip(edges[site], found, strict=True):
                        heads[str(Head(site.layer, edge.head, site.tower))].built = one
    except TapError as reason:
        for head in heads.values():
            head.built = None
        notes.append(f"Who built the scores of passages is left out: {reason}")


def _add_writes(model: HookedModel, heads: dict[str, HeadEvidence], notes: list[str]) -> None:
    try:
        directions = ov_directions(model)
    except TapError as reason:
        notes.append(f"What OV circuits promote is left out: {reason}")
        return

    def said(ids: list[int]) -> tuple[str, ...]:
        return tuple(pieces(model.tokenizer, [i])[0] for i in ids)

    for name, some in directions.items():
        heads[name].writes = [
            Writes(d.share, said(d.reads), said(d.promotes), said(d.lowers)) for d in some
        ]


def _add_partners(model: HookedModel, heads: dict[str, HeadEvidence], notes: list[str]) -> None:
    if not comparing(model.n_heads, model.n_layers, model.d_head):
        notes.append(
            "Partners are left out: comparing all heads of this model takes long; "
            "interp.mechanics.composition(model) does it."
        )
        return
    if len(main_sites(model)) < 2:
        return  # no head reads from another
    try:
        frame = scores_of(model, "qkv", torch.float32)
    except TapError as reason:
        notes.append(f"Partners are left out: {reason}")
        return
    for side, other, earlier in (("receiver", "sender", True), ("sender", "receiver", False)):
        best = frame.sort_values("above_random", ascending=False, kind="stable")
        best = best.groupby([side, "kind"], sort=False).head(PARTNERS)
        for row in best.itertuples():
            heads[str(getattr(row, side))].partners.append(
                Partner(
                    str(getattr(row, other)),
                    str(row.kind),
                    earlier,
                    float(row.score),
                    float(row.above_random),
                )
            )
