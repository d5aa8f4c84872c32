"""The `triton` backend: which kernels serve a call, in what order, and why.

few queries over a cache              split-KV decode, statistics from its scores
nothing or a few keys' masses asked   the vendor's fused call (CUDA), else our forward
row statistics, padding, soft-cap …   our forward, everything in one pass
attention received                    a key-major pass that reads the log-sum-exp
a rule over spans of keys             vendor states of the spans, merged
a rule over scattered keys    our forward a group (the others' keys hidden, or listed), merged
several rules                 the same states, merged in PyTorch but for the sum of the outputs
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import reference
from ..compose import Steers, fuse, refuse
from ..masking import Visibility
from ..request import Mask, Request, Result
from ..steer import Steer, factors
from ..streaming import spans
from ..streaming.chunked import run_chunks
from ..streaming.listed_keys import pair_mass
from ..streaming.prepared_steer import segments
from ..streaming.vendor import geometry
from . import vendor_states
from .decode import decode
from .forward import NAMES, Keys, State, forward
from .merge import Piece, merge
from .primitives import DTYPES, INTERPRETED, MAX_DIM, MAX_GROUPS
from .received import received

#: Up to so many query rows are a decode step: split over the keys, scores kept.
DECODE_ROWS = 8


@dataclass(frozen=True)
class Route:
    """`kind`: "decode", "vendor" (with `call`), "spans" (with `call`), "forward", "groups"; `why`
    in words."""

    kind: str
    why: str
    call: str = ""


def usable(device: torch.device) -> str:
    """Why no kernel can run on tensors of this device, "" if they can."""
    if device.type == "cuda" and not INTERPRETED:
        return ""
    if device.type == "cpu" and INTERPRETED:
        return ""
    if INTERPRETED:
        return f"TRITON_INTERPRET=1 runs kernels on the CPU, and the tensors are on {device}"
    return (
        f"it needs a CUDA GPU and the tensors are on {device} (TRITON_INTERPRET=1 runs it "
        "there, slowly, for tests)"
    )


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    sinks: Tensor | None = None,
    request: Request | None = None,
    steer: Steers = None,
) -> str:
    """Why this call is not for the kernels, "" if it is."""
    if reason := usable(q.device):
        return reason
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return (
            f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype}; the kernels take one of bf16, "
            "fp16 and fp32"
        )
    if max(q.shape[3], v.shape[3]) > MAX_DIM:
        return (
            f"heads of dimension {max(q.shape[3], v.shape[3])} do not fit a tile; up to "
            f"{MAX_DIM} do"
        )
    if mask.dense is not None:
        return "the mask is dense; the kernels know causality, windows, offsets and padding"
    if Visibility(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device).keep_first:
        return "mask.keep_first keeps keys beyond the window, which the streaming route has"
    if scale <= 0:
        return f"the scale is {scale}; the kernels fuse it with the maximum and want it positive"
    steers = fuse(steer, k.shape[2], q.device)
    if len(steers) > 1:
        return (
            "edits after a blend, or of more than 256 groups together, need the whole weights: "
            "the streaming route"
        )
    steer = _only(steers)
    if steer.groups > MAX_GROUPS:
        return f"the rule has {steer.groups} groups of keys; the kernels take up to {MAX_GROUPS}"
    if torch.is_grad_enabled():
        leaves = [q, k, v, sinks, steer.temper, steer.bias]
        if any(t is not None and t.requires_grad for t in leaves):
            return "q, k, v, sinks, temper or bias need gradients, which the streaming route has"
        if any(t.requires_grad for t in steer.tensors) and _decodes(q, steer):
            return (
                "an edit's parameters need gradients in a decode step, which the streaming "
                "route has"
            )
    if request and not _decodes(q, steer) and (steer.rule is not None or steer.blend is not None):
        return "statistics of weights after a rule or a blend need the streaming route"
    if request and _decodes(q, steer) and steer.blend is not None:
        return "statistics of weights after a blend need the streaming route"
    return ""


def _only(steers: tuple[Steer, ...]) -> Steer:
    """The one edit that `fuse` left."""
    if len(steers) > 1:
        raise ValueError("The kernels take edits that fuse into one; `why_not` says so.")
    return steers[0] if steers else Steer()


def _decodes(q: Tensor, steer: Steer) -> bool:
    return q.shape[2] <= DECODE_ROWS and steer.sigmoid is None and len(steer.rules) < 2


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vis: Visibility,
    softcap: float | None,
    sinks: Tensor | None,
    request: Request,
    steer: Steer,
) -> Route:
    """Which kernels, and why."""
    if _decodes(q, steer):
        return Route("decode", f"{q.shape[2]} query row{'s' * (q.shape[2] > 1)}")
    own = "forward" if steer.rule is None else "groups"
    if request.names - {"pair_mass"}:
        return Route(
            own, f"{', '.join(sorted(request.names - {'pair_mass'}))} come in the same pass"
        )
    for name in ("sigmoid", "temper", "bias"):
        if getattr(steer, name) is not None:
            return Route(own, f"steer.{name} changes the logits")
    if steer.labels is not None:
        return Route(own, "a rule over scattered keys: a state a group, merged")
    if softcap is not None:
        return Route(own, "of soft-capped logits")
    if vis.keys is not None:
        return Route(own, "of padding")
    shape, why = geometry(vis)
    if not shape:
        return Route(own, f"because {why}")
    if steer.rule is not None and len(segments(steer.spans, vis.lk)) > 8:
        return Route(own, "the spans cut the keys into more than 8 segments")
    call, why = vendor_states.name_of(q, k, v)
    if not call:
        return Route(own, f"because {why}")
    return Route(
        "spans" if steer.rule is not None or shape == "prefix" else "vendor", f"{shape} call", call
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    request: Request | None = None,
    steer: Steers = None,
) -> Result:
    """As `reference.attention`, with kernels. Gradients flow to a rule's tensors, blend and
    gain."""
    request = Request() if request is None else request
    refuse(steer, sinks, request)
    vis = Visibility(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    steer = _only(fuse(steer, k.shape[2], q.device)).to(q.device)
    route = choose(q, k, v, vis, softcap, sinks, request, steer)
    if route.kind == "decode":
        return _decode(q, k, v, vis, scale, softcap, sinks, request, steer)
    row_names = [name for name in NAMES if name in request.names]
    if route.kind == "vendor":
        with torch.no_grad():
            out, lse = vendor_states.flash(route.call, scale)(
                q, k, v, geometry(vis)[0] == "square", None
            )
        pieces = [Piece(0, 0, out, lse)]
        stats: dict[str, Tensor] = {}
    elif route.kind == "spans":
        pieces, stats = _span_pieces(q, k, v, vis, scale, steer, route), {}
    else:
        pieces, stats = _own_pieces(q, k, v, vis, scale, softcap, sinks, request, steer, row_names)
    left = None if route.kind == "forward" else sinks  # the forward kernel takes them in
    if (
        len(pieces) == 1
        and steer.rule is None
        and steer.blend is None
        and steer.gain is None
        and left is None
    ):
        state = State(pieces[0].out, pieces[0].lse)
    else:
        state = merge(
            pieces,
            steer.rule,
            queries=q.shape[2],
            v=v,
            sinks=left,
            blend=steer.blend,
            gain=steer.gain,
            offset=mask.q_start - mask.k_start,
            keys=vis.keys,
        )
    if request:
        with torch.no_grad():
            stats |= _second_look(q, k, v, state.lse, vis, scale, softcap, sinks, request, steer)
    return Result(state.out, state.lse, stats)


def _own_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vis: Visibility,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    request: Request,
    steer: Steer,
    names: list[str],
) -> tuple[list[Piece], dict[str, Tensor]]:
    """States by our forward kernel: one over all keys, or one a group of the rule."""
    mask = vis.mask
    base = Keys.padding(vis.keys)

    def run(keys: Keys, sinks: Tensor | None) -> State:
        with torch.no_grad():
            return forward(
                q,
                k,
                v,
                scale=scale,
                causal=mask.causal,
                offset=mask.q_start - mask.k_start,
                window=mask.window,
                keys=keys,
                softcap=softcap,
                sinks=sinks,
                temper=steer.temper,
                bias=steer.bias,
                sigmoid=steer.sigmoid,
                names=names,
                labels=None if request.labels is None else request.labels.to(q.device),
                n_groups=request.n_groups,
                cap=request.cap,
                real=vis.rows,
            )

    if steer.rule is None:
        state = run(base, sinks)
        return [Piece(0, 0, state.out, state.lse)], state.stats
    labels = steer.labels_of(vis.lk, q.device)
    pieces = []
    for group in range(steer.groups):
        state = run(base.group(labels, group, vis.batch, vis.heads), None)
        pieces.append(Piece(group, 0, state.out, state.lse))
    return pieces, {}


def _span_pieces(
    q: Tensor, k: Tensor, v: Tensor, vis: Visibility, scale: float, steer: Steer, route: Route
) -> list[Piece]:
    """States by vendor calls on the parts of the square that the spans cut, none of which has an
    empty row."""
    causal = vis.mask.causal and geometry(vis)[0] != "full"
    with torch.no_grad():
        found = spans.states(
            q,
            k,
            v,
            vis=vis,
            scale=scale,
            segments=segments(steer.spans, vis.lk),
            groups=steer.groups,
            causal=causal,
            flash=vendor_states.flash(route.call, scale),
            narrow=1,
        )
    return [
        Piece(group, s.r0, s.out.expand(-1, -1, s.r1 - s.r0, -1).to(v.dtype), s.lse.float())
        for group, states in enumerate(found)
        for s in states
    ]


def _second_look(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    vis: Visibility,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    request: Request,
    steer: Steer,
) -> dict[str, Tensor]:
    """What is read with the log-sum-exp in hand: masses of listed keys, columns, top-k."""
    stats: dict[str, Tensor] = {}
    plain = steer.temper is None and steer.bias is None
    if plain:
        for name, index in request.pairs.items():
            stats[f"pair_mass:{name}"] = pair_mass(
                q, k, lse, index, vis=vis, scale=scale, softcap=softcap
            )
    for name, question in request.received.items():
        stats[f"received:{name}"], stats[f"received_count:{name}"] = received(
            q,
            k,
            lse,
            question,
            mask=vis.mask,
            scale=scale,
            softcap=softcap,
            temper=steer.temper,
            bias=steer.bias,
        )
    logits = Steer(temper=steer.temper, bias=steer.bias)
    if request.topk and request.topk_rows is not None:
        stats |= top_rows(q, k, v, lse, vis, scale, softcap, request, logits)
    whole = request.topk if request.topk_rows is None else 0
    if whole or (request.pairs and not plain):
        rest = Request(pairs={} if plain else request.pairs, topk=whole)
        stats |= run_chunks(
            q,
            k,
            v,
            vis=vis,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            request=rest,
            steer=logits or None,
        ).stats
    return stats


def top_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    vis: Visibility,
    scale: float,
    softcap: float | None,
    request: Request,
    steer: Steer,
) -> dict[str, Tensor]:
    """The strongest keys of chosen rows of a prompt: as many decode steps side by side,
    `DECODE_ROWS` at a time, since each keeps its scores. Probabilities are by the whole call's
    log-sum-exp, which knows the sinks."""
    assert request.topk_rows is not None
    chosen = request.topk_rows.to(q.device)
    offset = vis.mask.q_start - vis.mask.k_start
    indices, probs = [], []
    for rows in chosen.split(DECODE_ROWS):
        temper = steer.temper
        if temper is not None and temper.shape[2] > 1:
            temper = temper.index_select(2, rows)
        real = None if vis.rows is None else vis.rows.index_select(1, rows)
        got = decode(
            q.index_select(2, rows),
            k,
            v,
            mask=replace(vis.mask, queries=real),
            scale=scale,
            softcap=softcap,
            steer=Steer(temper=temper, bias=steer.bias),
            topk=request.topk,
            stands=rows + offset,
        )
        assert got.topk_index is not None and got.topk_prob is not None
        share = (
            (got.lse - lse.index_select(2, rows)).exp().nan_to_num(0.0)
        )  # below 1 where there are sinks
        indices.append(got.topk_index)
        probs.append(got.topk_prob * share[..., None])
    return {"topk_index": torch.cat(indices, 2), "topk_prob": torch.cat(probs, 2)}


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vis: Visibility,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    request: Request,
    steer: Steer,
) -> Result:
    """A few rows: out, lse and top-k from the kernels, other statistics from the raw scores, which
    are O(keys)."""
    rules = steer.rules  # one at most
    whole = bool(request.names or request.received or request.pairs or (request.topk and rules))
    with torch.no_grad():
        got = decode(
            q, k, v, mask=vis.mask, scale=scale, softcap=softcap, sinks=sinks, steer=steer,
            topk=0 if whole else request.topk, scores=whole,
        )  # fmt: skip
    stats: dict[str, Tensor] = {}
    if whole:
        assert got.scores is not None
        every = slice(None)
        visible = vis.visible(every, every, 0, vis.lq, 0, vis.lk).expand(got.scores.shape)
        safe = got.lse.masked_fill(got.lse == -torch.inf, 0.0)
        a = (got.scores - safe[..., None]).exp()
        if rules:
            assert got.masses is not None
            gone = (
                None if sinks is None else (sinks.to(safe)[None, :, None] - safe).exp()[..., None]
            )
            labels = steer.labels_of(vis.lk, q.device)[:, :, None].expand(a.shape)
            a = a * factors(got.masses, rules, gone).gather(-1, labels)
        stats = reference.statistics(a, visible, vis, request)
    elif request.topk:
        assert got.topk_index is not None and got.topk_prob is not None
        stats = {"topk_index": got.topk_index, "topk_prob": got.topk_prob}
        reference.choose_rows(stats, request)
    return Result(got.out, got.lse, stats)


def explain_route(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    softcap: float | None,
    sinks: Tensor | None,
    request: Request,
    steer: Steers = None,
) -> str:
    """One line: which kernels `attention` would run, and why."""
    steer = _only(fuse(steer, k.shape[2], q.device))
    vis = Visibility(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    route = choose(q, k, v, vis, softcap, sinks, request, steer)
    first = {
        "decode": "split-KV decode",
        "vendor": route.call,
        "spans": f"{route.call} on the spans and the rest",
        "forward": "fused forward",
        "groups": "fused forward, once a group",
    }[route.kind]
    steps = [first]
    if route.kind != "decode":
        if route.kind in ("spans", "groups") or steer.blend is not None or steer.gain is not None:
            steps.append(
                "fused merge" if len(steer.rules) < 2 else f"{len(steer.rules)} rules, weighted sum"
            )
        if request.pairs:
            steps.append("exp(q·k − lse) over listed keys")
        if request.received:
            steps.append(f"key-major pass ×{len(request.received)}")
        if request.topk:
            steps.append(
                "chunked top-k"
                if request.topk_rows is None
                else "decode steps for the chosen rows' top-k"
            )
    return f"triton: {' + '.join(steps)} ({route.why})"
