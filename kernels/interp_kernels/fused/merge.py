"""From the states of groups of keys to the edited output: masses, rule, own key, gain, in one pass
over the outputs.

A piece is (ô, lse) over some keys for rows start … stop, from any flash attention. With the
log-sum-exp of all pieces (and a sink logit), P_i = exp(lse_i − lse), P_g the sum over the group's
pieces, and

    out = gain · [(1 − u)·Σ_i f_{g(i)}(P)·P_i·ô_i + u·v_own]
    f_g = w_g / P_g, see `steer.Rule`

Under gradients, or with several rules one after the other, the masses and factors, which are small,
are torch's business, and the weighted sum of the outputs is a kernel with a backward kernel: ∂ô_i =
w_i·∂out, ∂w_i = ⟨ô_i, ∂out⟩.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call
from ..steer import factors
from .edited import own_seen
from .forward import State
from .pieces import Piece, shares
from .primitives import FLOOR, INTERPRETED, NOTHING, device_of, flags, padded_dim, schema, strides
from .weighted import Weighted

#: Pieces a kernel takes at once; more are merged by groups first.
MAX_PIECES = 8


@triton.jit
def rule_factors(  # noqa: PLR0913
    mass, keep, receive, gone,
    test_ptr, bound_ptr, on,
    TESTS: tl.constexpr, GROUPS: tl.constexpr, RECEIVE: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """(rows, GROUPS) f_g = w_g / P_g from masses of that shape; keep, receive (1, GROUPS); gone
    (rows,) the mass of a sink logit; on (rows,) bool: rows the rule is for. As `steer.factors`."""
    if RENORMALISE:
        if RECEIVE:
            least = receive / tl.where(mass > NOTHING, mass, 1.0)
            keep = tl.where(mass > NOTHING, tl.maximum(keep, least), keep)
        kept = tl.sum(keep * mass, 1)
        total = kept + gone
        new = tl.where((total > 0)[:, None], keep / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    elif RECEIVE:
        shared = tl.sum(receive * mass, 1)
        freed = tl.sum((1.0 - keep) * mass, 1)
        moved = keep + receive * (freed / tl.where(shared > NOTHING, shared, 1.0))[:, None]
        nobody = tl.max(tl.abs(receive), 1) == 0
        new = tl.where(((shared > NOTHING) | nobody)[:, None], moved, 1.0)
    else:
        new = keep + tl.zeros_like(mass)
    g = tl.arange(0, GROUPS)
    for i in tl.static_range(TESTS):
        test = tl.load(test_ptr + i * GROUPS + g)[None, :]
        on = on & (tl.sum(test * mass, 1) >= tl.load(bound_ptr + i))
    return tl.where(on[:, None], new, 1.0)


@triton.jit
def merge_kernel(  # noqa: PLR0913
    outs, lses, starts, stops, groups, o_bs, o_hs, o_ms,
    v_ptr, out_ptr, lse_ptr, sink_ptr, keep_ptr, receive_ptr, test_ptr, bound_ptr, on_ptr, own_ptr,
    blend_ptr, gain_ptr,
    v_b, v_h, v_n, v_d, r_b, r_h, r_m, keep_h, receive_h, blend_h, gain_b, gain_h, gain_m,
    own_b, own_h, own_m, lq, off, heads,
    N: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BM: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr,
    SINK: tl.constexpr, RULE: tl.constexpr, RECEIVE: tl.constexpr, RENORMALISE: tl.constexpr, TESTS:
    tl.constexpr,
    ROWS: tl.constexpr, BLEND: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """A program is BM rows of one head."""
    pid = tl.program_id(0)
    n_m = tl.cdiv(lq, BM)
    r0 = (pid % n_m) * BM
    head = ((pid // n_m) % heads).to(tl.int64)
    batch = (pid // (n_m * heads)).to(tl.int64)
    rows = r0 + tl.arange(0, BM)  # (BM,)
    row_ok = rows < lq
    cols = tl.arange(0, DVP)
    g = tl.arange(0, GROUPS)
    flat = (batch * heads + head) * lq + rows

    top = tl.full([BM], FLOOR, tl.float32)
    for i in tl.static_range(N):
        inside = (rows >= starts[i]) & (rows < stops[i])
        at = (batch * heads + head) * (stops[i] - starts[i]) + rows - starts[i]
        lse = tl.load(lses[i] + at, mask=inside, other=float("-inf")) * 1.4426950408889634
        top = tl.maximum(top, lse)
    empty = top <= FLOOR
    sink = 0.0
    if SINK:
        sink = tl.load(sink_ptr + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    norm = tl.zeros([BM], tl.float32)
    mass = tl.zeros([BM, GROUPS], tl.float32)
    for i in tl.static_range(N):
        inside = (rows >= starts[i]) & (rows < stops[i])
        at = (batch * heads + head) * (stops[i] - starts[i]) + rows - starts[i]
        lse = tl.load(lses[i] + at, mask=inside, other=float("-inf")) * 1.4426950408889634
        share = tl.exp2(lse - top)
        norm += share
        mass += tl.where(g[None, :] == groups[i], share[:, None], 0.0)
    gone = tl.zeros([BM], tl.float32)
    if SINK:
        gone += tl.exp2(sink - top)
        norm += gone
    empty = empty & (norm == norm)  # a maximum passes over NaN, a sum does not
    norm = tl.where(empty, 1.0, norm)
    mass = mass / norm[:, None]
    gone = gone / norm

    factor = tl.full([BM, GROUPS], 1.0, tl.float32)
    if RULE:
        on = row_ok
        if ROWS:
            on = on & (tl.load(on_ptr + batch * lq + rows, mask=row_ok, other=0) != 0)
        keep = tl.load(keep_ptr + head * keep_h + g)[None, :]
        receive = keep
        if RECEIVE:
            receive = tl.load(receive_ptr + head * receive_h + g)[None, :]
        factor = rule_factors(
            mass, keep, receive, gone, test_ptr, bound_ptr, on, TESTS, GROUPS, RECEIVE, RENORMALISE
        )

    out = tl.zeros([BM, DVP], tl.float32)
    for i in tl.static_range(N):
        inside = (rows >= starts[i]) & (rows < stops[i])
        at = (batch * heads + head) * (stops[i] - starts[i]) + rows - starts[i]
        lse = tl.load(lses[i] + at, mask=inside, other=float("-inf")) * 1.4426950408889634
        weight = (
            tl.exp2(lse - top) / norm * tl.sum(tl.where(g[None, :] == groups[i], factor, 0.0), 1)
        )
        o_at = (
            outs[i]
            + batch * o_bs[i]
            + head * o_hs[i]
            + (rows - starts[i]).to(tl.int64)[:, None] * o_ms[i]
        )
        o = tl.load(
            o_at + cols[None, :], mask=inside[:, None] & (cols[None, :] < DV), other=0.0
        )  # (BM, DVP)
        # a state over no key may hold anything; its weight is 0
        out += tl.where(weight[:, None] != 0, weight[:, None] * o.to(tl.float32), 0.0)
    if BLEND:
        u = tl.load(blend_ptr + head * blend_h).to(tl.float32)
        own = rows + off
        own_at = own_ptr + batch * own_b + head * own_h + rows * own_m
        there = tl.load(own_at, mask=row_ok, other=0) != 0
        v_at = (
            v_ptr
            + batch * v_b
            + (head // GROUP) * v_h
            + own.to(tl.int64)[:, None] * v_n
            + cols[None, :] * v_d
        )
        v = tl.load(v_at, mask=there[:, None] & (cols[None, :] < DV), other=0.0)
        out = tl.where(there[:, None], (1.0 - u) * out + u * v.to(tl.float32), out)
    if GAIN:
        gain = tl.load(
            gain_ptr + batch * gain_b + head * gain_h + rows * gain_m, mask=row_ok, other=0.0
        ).to(tl.float32)
        out = out * gain[:, None]
    out_at = out_ptr + batch * r_b + head * r_h + rows.to(tl.int64)[:, None] * r_m + cols[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & (cols[None, :] < DV))
    lse = (top + tl.log2(norm)) * 0.6931471805599453
    tl.store(lse_ptr + flat, tl.where(empty, float("-inf"), lse), mask=row_ok)


def merge(pieces: Sequence[Piece], call: Call) -> State:
    """The edited output (batch, heads, queries, d_v) and the log-sum-exp over all pieces and the
    call's sinks, by its edit's rules, blend and gain. Differentiable in the pieces, the rules'
    tensors, blend and gain."""
    steer, sinks, vis = call.steer, call.sinks, call.vis
    rules = steer.rules
    parameters = [steer.blend, steer.gain, *(t for r in rules for t in (r.keep, r.receive))]
    if call.needs_grad(*parameters, sinks, *(p.out for p in pieces), *(p.lse for p in pieces)):
        return _differentiable(pieces, call)
    while len(pieces) > MAX_PIECES:  # first the pieces of one group, which need no rule
        pieces = _fewer(pieces, call)
    if len(rules) > 1:
        return _differentiable(pieces, call)
    rule = rules[0] if rules else None
    n = 1 if rule is None else rule.groups
    size = triton.next_power_of_2(max(n, 2))
    keep = receive = tests = None
    if rule is not None:
        keep = torch.nn.functional.pad(rule.keep.float(), (0, size - n), value=1.0)
        receive = (
            None
            if rule.receive is None
            else torch.nn.functional.pad(rule.receive.float(), (0, size - n))
        )
        tests = (
            None
            if rule.tests is None
            else torch.nn.functional.pad(rule.tests.float(), (0, size - n))
        )
    out, lse = _merge(
        [p.out for p in pieces],
        [p.lse for p in pieces],
        [p.start for p in pieces],
        [p.group if rule is not None else 0 for p in pieces],
        call.v,
        sinks,
        keep,
        receive,
        tests,
        None if rule is None or rule.bounds is None else rule.bounds.float(),
        None if rule is None else rule.rows,
        None if steer.blend is None else own_seen(call),
        steer.blend,
        steer.gain,
        rule is not None and rule.renormalise,
        vis.offset,
        vis.lq,
    )
    return State(out, lse)


def _differentiable(pieces: Sequence[Piece], call: Call) -> State:
    """`merge` where gradients are wanted, or several rules follow each other."""
    rules, queries = call.steer.rules, call.vis.lq
    share, gone, lse, empty = shares(pieces, call)
    weight = list(share.unbind(-1))
    if rules:  # no index tensors, which would be copied to the device
        mass = [torch.zeros_like(lse)] * rules[0].groups
        for piece, part in zip(pieces, weight, strict=True):
            mass[piece.group] = mass[piece.group] + part
        factor = factors(torch.stack(mass, -1), rules, gone)
        weight = [
            part * factor[..., piece.group] for piece, part in zip(pieces, weight, strict=True)
        ]
    weights = [
        w[:, :, p.start : p.start + p.lse.shape[2]] for p, w in zip(pieces, weight, strict=True)
    ]
    out = Weighted.apply(
        queries, tuple(p.start for p in pieces), *weights, *(p.out for p in pieces)
    )
    out = _blend_and_gain(out, call)
    return State(out, lse.masked_fill(empty, -torch.inf))


def _blend_and_gain(out: Tensor, call: Call) -> Tensor:
    """gain·((1 − u)·out + u·v_own), differentiable; row i's own key is column i + offset."""
    v, vis, blend, gain = call.v, call.vis, call.steer.blend, call.steer.gain
    if blend is not None and vis.lk:
        own = (torch.arange(vis.lq, device=out.device) + vis.offset).clamp(0, vis.lk - 1)
        u = blend.to(out.dtype)[None, :, None, None] * own_seen(call)[..., None]
        out = (1 - u) * out + u * v[:, :, own].repeat_interleave(out.shape[1] // v.shape[1], 1)
    return out if gain is None else out * gain.to(out.dtype)[..., None]


def _fewer(pieces: Sequence[Piece], call: Call) -> list[Piece]:
    """The pieces of the group that has most, or as many of them as fit, become one."""
    groups = [p.group for p in pieces]
    most = max(set(groups), key=groups.count)
    taken = [p for p in pieces if p.group == most][:MAX_PIECES]
    state = merge(taken, replace(call, steers=(), sinks=None))
    return [p for p in pieces if not any(p is t for t in taken)] + [
        Piece(most, 0, state.out, state.lse)
    ]


@dataclass(frozen=True)
class _Arguments:
    """What the operator takes."""

    outs: list[Tensor]
    lses: list[Tensor]
    starts: list[int]
    groups: list[int]
    v: Tensor
    sinks: Tensor | None
    keep: Tensor | None
    receive: Tensor | None
    tests: Tensor | None
    bounds: Tensor | None
    on: Tensor | None
    own: Tensor | None
    blend: Tensor | None
    gain: Tensor | None
    renormalise: bool
    offset: int
    queries: int


@torch.library.custom_op(
    "interp::merge", mutates_args=(), schema=schema(_Arguments, "(Tensor, Tensor)")
)
def _merge(*values: Any) -> tuple[Tensor, Tensor]:
    x = _Arguments(*values)
    v, starts, queries = x.v, x.starts, x.queries
    out, lse = _empty(x.outs, queries)
    batch, heads, _, d_v = out.shape
    if not out.numel():
        return out, lse
    outs = [o if o.stride(-1) == 1 else o.contiguous() for o in x.outs]
    stops = tuple(start + o.shape[2] for start, o in zip(starts, outs, strict=True))
    rows = 16 if INTERPRETED else max(16, min(64, 8192 // padded_dim(d_v)))
    with device_of(out):
        merge_kernel[(-(-queries // rows) * heads * batch,)](
            tuple(outs),
            tuple(piece.contiguous() for piece in x.lses),
            tuple(starts),
            stops,
            tuple(x.groups),
            *(tuple(o.stride(i) for o in outs) for i in range(3)),
            v,
            out,
            lse,
            x.sinks,
            x.keep,
            x.receive,
            x.tests,
            x.bounds,
            flags(None if x.on is None else x.on.contiguous()),
            flags(x.own),
            x.blend,
            x.gain,
            *v.stride(),
            *out.stride()[:3],
            strides(x.keep, 2)[0],
            strides(x.receive, 2)[0],
            strides(x.blend, 1)[0],
            *strides(x.gain, 3),
            *strides(x.own, 3),
            queries,
            x.offset,
            heads,
            N=len(outs),
            GROUP=heads // v.shape[1],
            GROUPS=2 if x.keep is None else x.keep.shape[-1],
            BM=rows,
            DV=d_v,
            DVP=padded_dim(d_v),
            SINK=x.sinks is not None,
            RULE=x.keep is not None,
            RECEIVE=x.receive is not None,
            RENORMALISE=x.renormalise,
            TESTS=0 if x.tests is None else x.tests.shape[0],
            ROWS=x.on is not None,
            BLEND=x.blend is not None,
            GAIN=x.gain is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out, lse


@_merge.register_fake
def _(outs: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty(outs, rest[-1])


def _empty(outs: list[Tensor], queries: int) -> tuple[Tensor, Tensor]:
    batch, heads, _, d_v = outs[0].shape
    out = outs[0].new_empty(batch, queries, heads, d_v).transpose(1, 2)
    return out, outs[0].new_empty(batch, heads, queries, dtype=torch.float32)
