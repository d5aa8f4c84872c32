"""Attention and its statistics in O(L · chunk) memory: any device, any mask, differentiable.

`choose` says which way a call goes: the vendor's fused call (plus a few exp(q·k − lse) for
`pair_mass`); for an edit's rule the states of its groups of keys, merged by their log-sum-exps:
vendor calls on parts of the square for spans of keys (`spans`), calls with hidden keys and short
lists for scattered ones (`scattered`); or chunks of query rows over the keys they see, where one
product with [V | labels | 1 | positions] gives most statistics.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..call import NOTHING_ASKED, Call
from ..masking import FLOOR, bias_visible
from ..request import Result
from ..steer import Steer
from . import flash_gradients, scattered, spans, vendor
from .chunked import run_chunks
from .listed_keys import pair_mass
from .prepared_steer import SteerBlock, finish

_AS_IT_IS = nullcontext()
#: Query rows a chunk of the differentiable path.
_ROWS = 128
#: More spans of keys than this are scattered keys: each is one or two vendor calls and a product
#: with the output.
_MAX_SEGMENTS = 8
#: With so few query rows a pass over scattered keys is as quick in chunks.
_FEW_ROWS = 32


class Route(NamedTuple):
    """`shape` of the vendor calls, "" for chunks; `why` in words; `plan` where a rule's keys are
    scattered; `own_backward`: by `scaled_dot_product_attention` with the vendor's backward, which
    has no log-sum-exp."""

    shape: str
    why: str
    plan: scattered.Plan | None = None
    own_backward: bool = False


def _prepared(call: Call) -> Call:
    """Where the log-sum-exp is not read, an edit that only renormalises is a bias ln keep on the
    logits."""
    request, one = call.request, call.steer
    if request.lse or len(call.steers) != 1 or request or not one.rules:
        return call
    keys, device = call.vis.lk, call.q.device
    q_heads = max(
        [r.keep.shape[0] for r in one.rules] + [1 if one.labels is None else one.labels.shape[1]]
    )
    if any(not r.adds_to_logits or r.keep.requires_grad for r in one.rules):
        return call
    log_keep = torch.stack([r.keep.to(device).expand(q_heads, -1).log() for r in one.rules]).sum(
        0
    )  # (heads, groups)
    labels = one.labels_of(keys, device)  # (batch or 1, heads or 1, keys)
    shape = (len(labels), q_heads, keys)
    bias = log_keep.expand(len(labels), -1, -1).gather(
        -1, labels.expand(shape)
    )  # −inf where keep is 0
    if one.bias is not None:
        bias = (
            torch.where(bias_visible(one.bias.to(device)), one.bias.to(device), -torch.inf) + bias
        )
    return replace(call, steers=(replace(one, rule=None, labels=None, spans=(), bias=bias),))


def choose(call: Call) -> Route:
    """Which way the call goes, and why."""
    shape, why = vendor.shape_of(call)
    if not shape:
        square = vendor.geometry(call.vis)[0]
        if call.needs_grad(call.q, call.k, call.v) and not flash_gradients.why_not(call, square):
            return Route(square, "gradients of q, k and v are the vendor's own", own_backward=True)
        return Route("", f"because {why}")
    request, vis, one = call.request, call.vis, call.steer
    if len(call.steers) > 1:
        return Route(
            "",
            "edits after a blend, or of more than 256 groups together, need a pass over all keys",
        )
    if call.steers and (refusal := _needs_chunks(call)):
        return Route("", refusal)
    plan = None
    if one.labels is not None or (one.rule is not None and len(call.segments) > _MAX_SEGMENTS):
        if vis.lq > _FEW_ROWS:
            plan = scattered.plan(one.labels_of(vis.lk, call.q.device), one.groups, vis)
        if plan is None:
            what = "several groups of many" if vis.lq > _FEW_ROWS else "few query rows, and"
            return Route("", f"{what} scattered keys, need a pass over all keys")
    if request is not NOTHING_ASKED and not request.cheap:
        wanted = sorted(request.names - {"pair_mass"}) + ["received"] * bool(request.received)
        return Route(
            "", f"{', '.join(wanted + ['topk'] * bool(request.topk))} need a pass over all keys"
        )
    return Route(shape, why, plan)


def _needs_chunks(call: Call) -> str:
    """Why the edit needs a pass over all keys, "" if vendor calls may serve it."""
    request, steer = call.request, call.steer
    if steer.sigmoid is not None:
        return "steer.sigmoid is no softmax"
    if steer.temper is not None and call.q.dtype not in (torch.float32, torch.float64):
        return "steer.temper would round the queries once more"
    if request and (steer.rule is not None or steer.blend is not None):
        return "statistics of edited weights need a pass over all keys"
    if request and (steer.temper is not None or steer.bias is not None):
        return (
            f"statistics with steer.{'bias' if steer.temper is None else 'temper'} need a pass "
            "over all keys"
        )
    if call.needs_grad(steer.bias):
        return "the vendor's bias has no gradient"
    if steer.rule is None:
        return ""
    if steer.bias is not None:
        return "a rule beside a bias on the logits needs a pass over all keys"
    return ""


def attention(call: Call) -> Result:
    """As `reference.attention`; never holds a (queries, keys) matrix. Gradients flow through `out`
    and `lse` (not `lse` where PyTorch's own call stands in, which gives none); statistics are
    computed without gradients, in a pass of their own if some are needed."""
    call = _prepared(call)
    if not torch.is_grad_enabled():
        return _attention(call, False)
    edits = [tensor for one in call.steers for tensor in one.tensors]
    needs_grad = call.needs_grad(call.q, call.k, call.v, call.sinks, call.mask.dense, *edits)
    if not needs_grad or not call.request:
        return _attention(call, needs_grad)
    result = _attention(replace(call, request=replace(NOTHING_ASKED, lse=call.request.lse)), True)
    with torch.no_grad():
        return Result(result.out, result.lse, _attention(call, False).stats)


def _attention(call: Call, needs_grad: bool) -> Result:
    """By the route that `choose` names; with gradients only where they are asked for."""
    route = choose(call)
    if not route.shape:
        if needs_grad:
            return _differentiable(call)
        with _no_grad():
            return run_chunks(call)
    one, v = call.steer, call.v
    if one.temper is not None:
        call = replace(call, q=call.q * one.temper.to(call.q)[..., None])
    if route.own_backward:
        out, lse = flash_gradients.attend(call, route.shape), _lse_alone(call)
    elif one.rule is not None:
        with nullcontext() if needs_grad else _no_grad():
            if route.plan is None:
                flash = vendor.flash(call.scale)
                out, lse = spans.attend(call, flash, causal=route.shape != "full")
            else:
                states, rows = scattered.states(call, route.shape, route.plan), call.vis.lq
                out, lse = spans.merge(states, one.rule, call.sinks, rows=rows, dtype=v.dtype)
    else:
        out, lse = vendor.attend(call, route.shape, one.bias)
        if call.sinks is not None:
            out, lse = vendor.add_sink(out, lse, call.sinks)
    stats = {}
    if call.request.pairs:
        with _no_grad():
            for name, index in call.request.pairs.items():
                stats[f"pair_mass:{name}"] = pair_mass(call, lse, index)
    return Result(finish(out, v, call.vis, one), lse, stats)


def _lse_alone(call: Call) -> Tensor:
    """The log-sum-exp by products of queries and keys alone, without gradients; nothing where
    nobody reads it."""
    if not call.request.lse:
        return call.q.new_empty(*call.q.shape[:2], 0, dtype=call.dtype)
    with torch.no_grad():
        return run_chunks(replace(call, request=replace(NOTHING_ASKED, out=False))).lse


def _no_grad() -> AbstractContextManager[object]:
    """`torch.no_grad()` where gradients are on; entering it costs as much as a small operation."""
    return torch.no_grad() if torch.is_grad_enabled() else _AS_IT_IS


class _DifferentiableRows:
    """Output and log-sum-exp of a chunk of rows, out of place, for activation checkpointing."""

    def __init__(self, call: Call) -> None:
        everything = slice(None)
        self.call = call
        self.edits = [
            SteerBlock(steer, call.vis, everything, everything, call.dtype) for steer in call.steers
        ]
        #: The one with temper and bias.
        self.edit = self.edits[0] if self.edits else None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, r0: int, r1: int
    ) -> tuple[Tensor, Tensor]:
        c0, c1 = self.call.vis.span(r0, r1)
        values, width = v[:, :, c0:c1], c1 - c0
        s = self._logits(q, k, r0, r1, c0, c1)
        if self.edit is not None and self.edit.sigmoid is not None:
            p = torch.sigmoid(s + self.edit.sigmoid)
            total = p.sum(-1)
            lse = torch.where(total > 0, total, 1).log().masked_fill(total == 0, -torch.inf)
            return self._times(p, values), lse
        top = s.detach().amax(-1) if width else s.new_full(s.shape[:3], FLOOR)
        top = top.clamp_min(FLOOR)
        empty = top <= FLOOR
        logit = None if sinks is None else sinks.to(s.dtype)[None, :, None]
        if logit is not None:
            top = torch.maximum(top, logit.detach())
        p = torch.exp(s - top[..., None])
        extra = torch.zeros_like(top) if logit is None else torch.exp(logit - top)
        total = (p.sum(-1) + extra).masked_fill(empty, 1.0)
        lse = (top + total.log()).masked_fill(empty, -torch.inf)
        if len(self.edits) > 1 and width:
            a, sink = p / total[..., None], (extra / total).masked_fill(empty, 0.0)[..., None]
            for one in self.edits:
                a, sink = one.edited(a, sink, r0, r1, c0, c1)
            return self._times(a, values), lse
        if self.edit is not None and self.edit.rules and width:
            masses = self.edit.masses(p, c0, c1) / total[..., None]
            factor = self.edit.factors(masses, (extra / total)[..., None], r0, r1)
            p = self.edit.scale(p, factor, c0, c1)
        return self._times(p, values) / total[..., None], lse

    def _logits(self, q: Tensor, k: Tensor, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        """(batch, heads, rows, columns), edited, INVISIBLE and below where unseen."""
        call, everything, (batch, heads, _, d) = self.call, slice(None), q.shape
        kv_heads, n, width = k.shape[1], r1 - r0, c1 - c0
        # Query heads of one kv head side by side, so that keys are not repeated: (batch, kv_heads,
        # group · rows, d)
        queries = (q[:, :, r0:r1].to(call.dtype) * call.scale).reshape(
            batch, kv_heads, heads // kv_heads * n, d
        )
        keys = k[:, :, c0:c1].to(call.dtype).transpose(-1, -2)
        s = (queries @ keys).reshape(batch, heads, n, width)
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        if self.edit is not None:
            s = self.edit.logits(s, r0, r1, c0, c1, in_place=False)
        return call.vis.hide_(s, everything, everything, r0, r1, c0, c1)

    def _times(self, p: Tensor, values: Tensor) -> Tensor:
        """p·V (batch, heads, rows, d_v)."""
        batch, heads, n, width = p.shape
        kv_heads = values.shape[1]
        rows = p.reshape(batch, kv_heads, heads // kv_heads * n, width)
        return (rows @ values.to(p.dtype)).reshape(batch, heads, n, values.shape[3])


def _differentiable(call: Call) -> Result:
    """Chunks of rows under activation checkpointing, so that the backward pass is O(L · chunk) as
    well."""
    q, k, v, lq = call.q, call.k, call.v, call.vis.lq
    rows = _DifferentiableRows(call)
    parts = [
        checkpoint(rows, q, k, v, call.sinks, r0, min(r0 + _ROWS, lq), use_reentrant=False)
        for r0 in range(0, lq, _ROWS)
    ]
    out, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    for steer in call.steers:  # where there are several, blends are done
        one = steer if len(call.steers) == 1 else Steer(gain=steer.gain)
        out = finish(out, v, call.vis, one)
    return Result(out.to(v.dtype), lse)


def explain_route(call: Call) -> str:
    """One line: which way `attention` would go, and why."""
    call = _prepared(call)
    route, request, vis, one = choose(call), call.request, call.vis, call.steer
    if not route.shape:
        return f"streaming: chunked, {route.why}"
    extra = " + exp(q·k − lse) over listed keys" if request.pairs else ""
    extra += "".join(
        f" + {name}"
        for name in ("temper", "bias", "blend", "gain")
        if getattr(one, name) is not None
    )
    if route.plan is not None:
        calls = f"{route.plan}, merged by log-sum-exp and the rule"
    elif one.rule is not None:
        pieces = spans.pieces(call.segments, vis, route.shape != "full")
        plan = [(s, e) for _, _, _, s, e, _ in pieces]
        wide = sum(e - s > spans.NARROW for s, e in plan)
        counts = [(wide, "vendor SDPA call"), (len(plan) - wide, "small product")]
        calls = " and ".join(f"{n} {what}{'s' * (n > 1)}" for n, what in counts if n)
        calls += " merged by log-sum-exp and the rule"
    else:
        calls = _plain_calls(route)
    return f"streaming: {calls}{' + sink' if call.sinks is not None else ''}{extra} ({route.why})"


def _plain_calls(route: Route) -> str:
    if route.own_backward:
        return "SDPA and its own backward pass"
    return (
        "two vendor SDPA calls merged by log-sum-exp" if route.shape == "prefix" else "vendor SDPA"
    )
