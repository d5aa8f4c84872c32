"""The `triton` backend: which kernels serve a call, in what order, and why.

few queries over a cache              split-KV decode, statistics from its scores
nothing or a few keys' masses asked   the vendor's fused call (CUDA), else our forward
row statistics, padding, soft-cap …   our forward, everything in one pass
attention received                    a key-major pass that reads the log-sum-exp
a rule over spans of keys             vendor states of the spans, merged
a rule over scattered keys    our forward a group (the others' keys hidden, or listed), merged
several rules                 the same states, merged in PyTorch but for the sum of the outputs
statistics after a rule or a blend    a pass of queries and keys that knows the log-sum-exp
the strongest keys of every row       the same pass keeps block maxima; few blocks are read again
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import reference
from ..call import Call
from ..masking import FLOOR, Visibility
from ..request import Request, Result
from ..steer import Steer
from ..streaming import spans
from ..streaming.chunked import run_chunks
from ..streaming.listed_keys import pair_mass
from ..streaming.vendor import geometry
from . import capable, configs, vendor_states
from .capable import DoesNotRun, usable
from .decode import decode
from .decode_launch import Decoded
from .decode_statistics import statistics
from .edited import Edited, edited
from .forward import NAMES, Keys, State, forward
from .merge import merge
from .pieces import Piece
from .primitives import DTYPES, MAX_DIM, MAX_GROUPS
from .received import received
from .row_pass import row_pass, why_not_topk

__all__ = ["DoesNotRun", "Route", "attention", "choose", "explain_route", "usable", "why_not"]

#: Dimensions of V that are read where nobody wants the output: the fewest that tensor cores take.
LEAST_VALUES = 16
#: Up to so many query rows are a decode step: split over the keys, scores kept.
DECODE_ROWS = 8


@dataclass(frozen=True)
class Route:
    """`kind`: "decode", "vendor" (with `call`), "spans" (with `call`), "forward", "groups"; `why`
    in words."""

    kind: str
    why: str
    call: str = ""


def why_not(call: Call) -> str:
    """Why this call is not for the kernels, "" if it is."""
    q, steer = call.q, call.steer
    if reason := usable(q.device) or _why_not_tensors(call):
        return reason
    if call.needs_grad(call.mask.dense):
        return "the dense mask needs gradients, which the streaming route has"
    if call.scale <= 0:
        return (
            f"the scale is {call.scale}; the kernels fuse it with the maximum and want it positive"
        )
    if len(call.steers) > 1:
        return (
            "edits after a blend, or of more than 256 groups together, need the whole weights: "
            "the streaming route"
        )
    if steer.groups > MAX_GROUPS:
        return f"the rule has {steer.groups} groups of keys; the kernels take up to {MAX_GROUPS}"
    if call.needs_grad(q, call.k, call.v, call.sinks, steer.temper, steer.bias):
        return "q, k, v, sinks, temper or bias need gradients, which the streaming route has"
    decodes = _decodes(call)
    if decodes and call.needs_grad(None, *steer.tensors):
        return "an edit's parameters need gradients in a decode step, which the streaming route has"
    return capable.refusal(call)


def _why_not_tensors(call: Call) -> str:
    """Why these queries, keys and values are not for the kernels, "" if they are."""
    q, k, v = call.q, call.k, call.v
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return (
            f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype}; the kernels take one of bf16, "
            "fp16 and fp32"
        )
    dim = max(q.shape[3], v.shape[3])
    if dim > MAX_DIM:
        return f"heads of dimension {dim} do not fit a tile; up to {MAX_DIM} do"
    return configs.why_not(dim, q.dtype, q.device)


def ready(call: Call) -> Call:
    """The call with its edit on the device of its queries."""
    if len(call.steers) > 1:
        raise ValueError("The kernels take edits that fuse into one; `why_not` says so.")
    return replace(call, steers=tuple(one.to(call.q.device) for one in call.steers))


def _decodes(call: Call) -> bool:
    steer = call.steer
    blended = steer.blend is not None and (bool(call.request) or call.mask.dense is not None)
    return (
        call.vis.lq <= DECODE_ROWS
        and steer.sigmoid is None
        and len(steer.rules) < 2
        and not blended
    )


def _reweighs(call: Call) -> bool:
    """The edit changes weights after the softmax."""
    return call.steer.rule is not None or call.steer.blend is not None


def choose(call: Call) -> Route:
    """Which kernels, and why."""
    request, steer, vis = call.request, call.steer, call.vis
    if _decodes(call):
        return Route("decode", f"{vis.lq} query row{'s' * (vis.lq > 1)}")
    own = "forward" if steer.rule is None else "groups"
    if request.names - {"pair_mass"} and not _reweighs(call):
        return Route(
            own, f"{', '.join(sorted(request.names - {'pair_mass'}))} come in the same pass"
        )
    for name in ("sigmoid", "temper", "bias"):
        if getattr(steer, name) is not None:
            return Route(own, f"steer.{name} changes the logits")
    if steer.labels is not None:
        return Route(own, "a rule over scattered keys: a state a group, merged")
    if call.softcap is not None:
        return Route(own, "of soft-capped logits")
    if call.mask.dense is not None:
        return Route(own, "of the dense mask")
    if vis.keys is not None:
        return Route(own, "of padding")
    shape, why = geometry(vis)
    if not shape:
        return Route(own, f"because {why}")
    if steer.rule is not None and len(call.segments) > 8:
        return Route(own, "the spans cut the keys into more than 8 segments")
    kind = "spans" if steer.rule is not None or shape == "prefix" else "vendor"
    # keys after the last query (a static cache's empty end) are no part of the call
    seen = vis.span(0, vis.lq)[1]
    kinds = (False,) if shape == "full" else (True,) if kind == "vendor" else (True, False)
    name, why = vendor_states.name_of(call.q, call.k[:, :, :seen], call.v[:, :, :seen], kinds)
    if not name:
        return Route(own, f"because {why}")
    return Route(kind, f"{shape} call", name)


def attention(call: Call) -> Result:
    """As `reference.attention`, with kernels. Gradients flow to a rule's tensors, blend and
    gain. Raises `DoesNotRun`, once a configuration, where a kernel does not compile for the device
    or does not fit it."""
    try:
        result = _attention(ready(call))
        return result if call.request.out else replace(result, out=result.out[..., :0])
    except Exception as error:
        if not capable.does_not_run(error):
            raise
        raise DoesNotRun(capable.refuse(call, error)) from error


def _attention(call: Call) -> Result:
    route, request, steer = choose(call), call.request, call.steer
    if not request.out and route.kind not in ("vendor", "spans"):  # which take whole heads
        call = replace(call, v=call.v[..., :LEAST_VALUES])
    if route.kind == "decode":
        topk, scores = asked_of_decode(call)
        with torch.no_grad():
            return decoded(call, decode(call, topk=topk, scores=scores))
    stats: dict[str, Tensor] = {}
    if route.kind == "vendor":
        with torch.no_grad():
            flash = vendor_states.flash(route.call, call.scale)
            square, seen = geometry(call.vis)[0] == "square", call.vis.span(0, call.vis.lq)[1]
            out, lse = flash(call.q, call.k[:, :, :seen], call.v[:, :, :seen], square, None)
        pieces = [Piece(0, 0, out, lse)]
    elif route.kind == "spans":
        pieces = _span_pieces(call, route)
    else:
        pieces, stats = _own_pieces(call)
    # the forward kernel takes sinks in
    left = replace(call, sinks=None) if route.kind == "forward" else call
    changed = _reweighs(call) or steer.gain is not None
    if len(pieces) == 1 and not changed and left.sinks is None:
        state = State(pieces[0].out, pieces[0].lse)
    else:
        state = merge(pieces, left)
    if request:
        with torch.no_grad():
            weights = edited(left, pieces) if _reweighs(call) else Edited()
            stats |= _second_look(call, state.lse, weights)
    return Result(state.out, state.lse, stats)


def _own_pieces(call: Call) -> tuple[list[Piece], dict[str, Tensor]]:
    """States by our forward kernel: one over all keys, or one a group of the rule."""
    steer, vis = call.steer, call.vis
    asked = frozenset() if _reweighs(call) else call.request.names
    names = [name for name in NAMES if name in asked]
    base = Keys.padding(vis.keys)
    with torch.no_grad():
        if steer.rule is None:
            state = forward(call, base, names)
            return [Piece(0, 0, state.out, state.lse)], state.stats
        labels, without = steer.labels_of(vis.lk, call.q.device), replace(call, sinks=None)
        pieces = []
        for group in range(steer.groups):
            state = forward(without, base.group(labels, group, vis.batch, vis.heads))
            pieces.append(Piece(group, 0, state.out, state.lse))
    return pieces, {}


def _span_pieces(call: Call, route: Route) -> list[Piece]:
    """States by vendor calls on the parts of the square that the spans cut, none of which has an
    empty row."""
    causal = call.mask.causal and geometry(call.vis)[0] != "full"
    with torch.no_grad():
        flash = vendor_states.flash(route.call, call.scale)
        found = spans.states(call, flash, causal=causal, narrow=1)
    return [
        Piece(group, s.r0, s.out.expand(-1, -1, s.r1 - s.r0, -1).to(call.v.dtype), s.lse.float())
        for group, states in enumerate(found)
        for s in states
    ]


def _second_look(call: Call, lse: Tensor, weights: Edited) -> dict[str, Tensor]:
    """What is read with the log-sum-exp in hand: masses of listed keys, columns, the strongest
    keys; and all statistics of weights that a rule or a blend changed."""
    request, steer = call.request, call.steer
    stats: dict[str, Tensor] = {}
    for name, index in request.pairs.items():
        stats[f"pair_mass:{name}"] = pair_mass(
            call, lse, index, weights.factors, weights.labels, weights.blend
        )
    for name, question in request.received.items():
        answer, count = received(call, lse, question, weights)
        stats[f"received:{name}"], stats[f"received_count:{name}"] = answer, count
    if request.topk and request.topk_rows is not None:
        stats |= top_rows(call, lse, weights)
    names = request.names - {"pair_mass"} if weights else frozenset()
    whole = request.topk if request.topk_rows is None else 0
    if whole and why_not_topk(whole, call.vis.lk):
        kept = steer if weights else Steer(temper=steer.temper, bias=steer.bias)
        rest = replace(call, request=Request(topk=whole), steers=(kept,) if kept else ())
        stats |= run_chunks(rest).stats
        whole = 0
    if whole or names:
        stats |= row_pass(call, lse, weights, [n for n in NAMES if n in names], whole)
    return stats


def top_rows(call: Call, lse: Tensor, weights: Edited = Edited()) -> dict[str, Tensor]:
    """The strongest keys of chosen rows of a prompt: as many decode steps side by side,
    `DECODE_ROWS` at a time, since each keeps its scores. Probabilities are by the whole call's
    log-sum-exp, which knows the sinks; of the call's edit temper and bias count, and what `weights`
    says."""
    request, vis, steer, dense = call.request, call.vis, call.steer, call.mask.dense
    assert request.topk_rows is not None
    chosen = request.topk_rows.to(call.q.device)
    indices, probs = [], []
    for rows in chosen.split(DECODE_ROWS):
        temper = steer.temper
        if temper is not None and temper.shape[2] > 1:
            temper = temper.index_select(2, rows)
        mask = replace(
            vis.mask,
            queries=None if vis.rows is None else vis.rows.index_select(1, rows),
            dense=None if dense is None else dense.to(rows.device).index_select(2, rows),
        )
        logits = Steer(temper=temper, bias=steer.bias)
        part = replace(
            call,
            q=call.q.index_select(2, rows),
            vis=Visibility(mask, vis.batch, vis.heads, len(rows), vis.lk, call.q.device),
            sinks=None,
            steers=(logits,) if logits else (),
        )
        of_rows = lse.index_select(2, rows)
        if weights:
            got = decode(part, scores=True, stands=rows + vis.offset)
            index, prob = _strongest(got, of_rows, rows, weights, part)
        else:
            got = decode(part, topk=request.topk, stands=rows + vis.offset)
            assert got.topk_index is not None and got.topk_prob is not None
            # below 1 where there are sinks
            index, prob = got.topk_index, (got.lse - of_rows).exp().nan_to_num(0.0)[..., None]
            prob = got.topk_prob * prob
        indices.append(index)
        probs.append(prob)
    return {"topk_index": torch.cat(indices, 2), "topk_prob": torch.cat(probs, 2)}


def _strongest(
    got: Decoded, lse: Tensor, rows: Tensor, weights: Edited, part: Call
) -> tuple[Tensor, Tensor]:
    """The strongest keys of a few rows by their edited weights, from raw scores."""
    assert got.scores is not None and weights.factors is not None
    a = got.scores.sub(lse.clamp_min(FLOOR)[..., None]).exp_()  # (batch, heads, rows, keys)
    factors = weights.factors.index_select(2, rows)
    if weights.labels is None:
        a = a * factors
    else:
        a = a * factors.gather(-1, weights.labels[:, :, None].expand(a.shape))
    shown = got.scores > -torch.inf
    if weights.blend is not None:
        column = torch.arange(a.shape[-1], device=a.device)
        own = (rows + part.vis.offset)[:, None] == column
        a = a + weights.blend.index_select(2, rows)[..., None] * own
        shown = shown | (a > 0)
    if part.vis.rows is not None:
        shown = shown & part.vis.rows[:, None, :, None]
    n = min(part.request.topk, a.shape[-1])
    prob, index = a.masked_fill(~shown, -1.0).topk(n, dim=-1)
    lacking = part.request.topk - n
    index = torch.nn.functional.pad(index.masked_fill(prob < 0, -1), (0, lacking), value=-1)
    return index, torch.nn.functional.pad(prob.clamp_min(0), (0, lacking))


def asked_of_decode(call: Call) -> tuple[int, bool]:
    """(strongest keys, whether the raw scores) that the kernels give for what is asked: statistics
    other than top-k come from the scores, which are O(keys)."""
    request = call.request
    ruled = bool(request.topk and call.steer.rule is not None)
    whole = bool(request.names or request.received or request.pairs or ruled)
    return (0 if whole else request.topk), whole


def decoded(call: Call, got: Decoded) -> Result:
    """A few rows' result of what the kernels gave for `asked_of_decode`."""
    request, stats = call.request, dict[str, Tensor]()
    if got.scores is not None:
        stats = statistics(call, got)
    elif request.topk:
        assert got.topk_index is not None and got.topk_prob is not None
        stats = {"topk_index": got.topk_index, "topk_prob": got.topk_prob}
        reference.choose_rows(stats, request)
    return Result(got.out, got.lse, stats)


def explain_route(call: Call) -> str:
    """One line: which kernels `attention` would run, and why."""
    call = ready(call)
    route, request, steer = choose(call), call.request, call.steer
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
        steps += _row_steps(call)
    return f"triton: {' + '.join(steps)} ({route.why})"


def _row_steps(call: Call) -> list[str]:
    """The passes over rows that follow the output's."""
    request = call.request
    names = sorted(request.names - {"pair_mass"}) if _reweighs(call) else []
    steps = []
    if request.topk and request.topk_rows is not None:
        steps.append("decode steps for the chosen rows' top-k")
    elif request.topk:
        why = why_not_topk(request.topk, call.vis.lk)
        steps += [f"chunked top-k, of {why}"] if why else []
        names += [] if why else ["top-k by block maxima"]
    return [*steps, f"row-major pass of q and k: {', '.join(names)}"] if names else steps
