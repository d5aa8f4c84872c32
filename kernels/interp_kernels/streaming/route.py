"""Attention and its statistics in O(L · chunk) memory: any device, any mask, differentiable.

`choose` says which way a call goes: the vendor's fused call (plus a few exp(q·k − lse) for
`pair_mass`); for an edit's rule the states of its groups of keys, merged by their log-sum-exps:
vendor calls on parts of the square for spans of keys (`spans`), calls with hidden keys and short
lists for scattered ones (`scattered`); or chunks of query rows over the keys they see, where one
product with [V | labels | 1 | positions] gives most statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..compose import Steers, as_steers, fuse, refuse
from ..masking import FLOOR, Visibility, bias_visible, compute_dtype
from ..request import Mask, Request, Result
from ..steer import Steer
from . import scattered, spans, vendor
from .chunked import run_chunks
from .listed_keys import pair_mass
from .prepared_steer import SteerBlock, finish, segments

#: Query rows a chunk of the differentiable path.
_ROWS = 128
#: More spans of keys than this are scattered keys: each is one or two vendor calls and a product
#: with the output.
_MAX_SEGMENTS = 8
#: With so few query rows a pass over scattered keys is as quick in chunks.
_FEW_ROWS = 32


@dataclass(frozen=True)
class Route:
    """`shape` of the vendor calls, "" for chunks; `why` in words; `plan` where a rule's keys are
    scattered."""

    shape: str
    why: str
    plan: scattered.Plan | None = None


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _parameters(steer: Steers) -> list[Tensor]:
    return [tensor for one in as_steers(steer) for tensor in one.tensors]


def _prepared(
    steer: Steers, keys: int, device: torch.device, request: Request
) -> tuple[Steer, ...]:
    """Edits fused; where the log-sum-exp is not read, one that only renormalises is a bias ln keep
    on the logits."""
    steers = fuse(steer, keys, device)
    if request or request.lse or len(steers) != 1:
        return steers
    one = steers[0]
    q_heads = max(
        [r.keep.shape[0] for r in one.rules] + [1 if one.labels is None else one.labels.shape[1]]
    )
    if not one.rules or any(
        not r.renormalise or r.tests is not None or r.rows is not None or r.keep.requires_grad
        for r in one.rules
    ):
        return steers
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
    return (replace(one, rule=None, labels=None, spans=(), bias=bias),)


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vis: Visibility,
    softcap: float | None,
    sinks: Tensor | None,
    request: Request,
    steer: Steers = None,
) -> Route:
    shape, why = vendor.shape_of(vis, q, k, v, softcap)
    if not shape:
        return Route("", f"because {why}")
    steers = fuse(steer, vis.lk, q.device)
    if len(steers) > 1:
        return Route(
            "",
            "edits after a blend, or of more than 256 groups together, need a pass over all keys",
        )
    one = steers[0] if steers else Steer()
    if refusal := _needs_chunks(q, k, v, sinks, request, one):
        return Route("", refusal)
    plan = None
    if one.labels is not None or (
        one.rule is not None and len(segments(one.spans, vis.lk)) > _MAX_SEGMENTS
    ):
        if vis.lq > _FEW_ROWS:
            plan = scattered.plan(one.labels_of(vis.lk, q.device), one.groups, vis)
        if plan is None:
            what = "several groups of many" if vis.lq > _FEW_ROWS else "few query rows, and"
            return Route("", f"{what} scattered keys, need a pass over all keys")
    if not request.cheap:
        wanted = sorted(request.names - {"pair_mass"}) + ["received"] * bool(request.received)
        return Route(
            "", f"{', '.join(wanted + ['topk'] * bool(request.topk))} need a pass over all keys"
        )
    if _needs_grad(q, k, v, sinks, one.temper) and (shape == "prefix" or sinks is not None):
        return Route("", "the vendor's log-sum-exp has no gradient and merging needs one")
    return Route(shape, why, plan)


def _needs_chunks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, request: Request, steer: Steer
) -> str:
    """Why the edit needs a pass over all keys, "" if vendor calls may serve it."""
    if steer.sigmoid is not None:
        return "steer.sigmoid is no softmax"
    if steer.temper is not None and q.dtype not in (torch.float32, torch.float64):
        return "steer.temper would round the queries once more"
    if request and (steer.rule is not None or steer.blend is not None):
        return "statistics of edited weights need a pass over all keys"
    if request and (steer.temper is not None or steer.bias is not None):
        return (
            f"statistics with steer.{'bias' if steer.temper is None else 'temper'} need a pass "
            "over all keys"
        )
    if _needs_grad(steer.bias):
        return "the vendor's bias has no gradient"
    if steer.rule is None:
        return ""
    if steer.bias is not None:
        return "a rule beside a bias on the logits needs a pass over all keys"
    if _needs_grad(q, k, v, sinks, *(t for rule in steer.rules for t in (rule.keep, rule.receive))):
        return "the vendor's log-sum-exp has no gradient and merging by a rule needs one"
    return ""


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
    """As `reference.attention`; never holds a (queries, keys) matrix. Gradients flow through `out`
    (not `lse`, where the vendor computes it); statistics are computed without gradients, in a pass
    of their own if some are needed."""
    request = Request() if request is None else request
    refuse(steer, sinks, request)
    steers = _prepared(steer, k.shape[2], q.device, request)
    needs_grad = _needs_grad(q, k, v, sinks, mask.dense, *_parameters(steers))
    if needs_grad and request:
        result = attention(
            q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, steer=steers
        )
        with torch.no_grad():
            seen = attention(
                q,
                k,
                v,
                mask=mask,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                request=request,
                steer=steers,
            )
        return Result(result.out, result.lse, seen.stats)
    vis = Visibility(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    route = choose(q, k, v, vis, softcap, sinks, request, steers)
    if not route.shape:
        if needs_grad:
            return _differentiable(q, k, v, vis, scale, softcap, sinks, steers)
        with torch.no_grad():
            return run_chunks(
                q,
                k,
                v,
                vis=vis,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                request=request,
                steer=steers,
            )
    one = steers[0] if steers else Steer()
    if one.temper is not None:
        q = q * one.temper.to(q)[..., None]
    if route.plan is not None:
        assert one.rule is not None
        with torch.no_grad():
            found = scattered.states(
                q, k, v, vis=vis, shape=route.shape, scale=scale, plan=route.plan
            )
            out, lse = spans.merge(found, one.rule, sinks, rows=q.shape[2], dtype=v.dtype)
    elif one.rule is not None:
        with torch.no_grad():
            out, lse = spans.attend(
                q,
                k,
                v,
                vis=vis,
                scale=scale,
                segments=segments(one.spans, vis.lk),
                rule=one.rule,
                sinks=sinks,
                causal=route.shape != "full",
                flash=vendor.flash(scale),
            )
    else:
        out, lse = vendor.attend(q, k, v, vis=vis, shape=route.shape, scale=scale, bias=one.bias)
        if sinks is not None:
            out, lse = vendor.add_sink(out, lse, sinks)
    stats = {}
    with torch.no_grad():
        for name, index in request.pairs.items():
            stats[f"pair_mass:{name}"] = pair_mass(q, k, lse, index, vis=vis, scale=scale)
    return Result(finish(out, v, vis, one), lse, stats)


def _differentiable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vis: Visibility,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    steers: tuple[Steer, ...],
) -> Result:
    """Chunks of rows under activation checkpointing, so that the backward pass is O(L · chunk) as
    well."""
    dtype = compute_dtype(q, k, v)
    batch, heads, lq, d = q.shape
    kv_heads = k.shape[1]
    everything = slice(None)
    edits = [SteerBlock(steer, vis, everything, everything, dtype) for steer in steers]
    edit = edits[0] if edits else None  # the one with temper and bias

    def rows(
        q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, r0: int, r1: int
    ) -> tuple[Tensor, Tensor]:
        c0, c1 = vis.span(r0, r1)
        n, width = r1 - r0, c1 - c0
        # Query heads of one kv head side by side, so that keys are not repeated: (batch, kv_heads,
        # group · rows, d)
        side = heads // kv_heads * n
        queries = (q[:, :, r0:r1].to(dtype) * scale).reshape(batch, kv_heads, side, d)
        s = (queries @ k[:, :, c0:c1].to(dtype).transpose(-1, -2)).reshape(batch, heads, n, width)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if edit is not None:
            s = edit.logits(s, r0, r1, c0, c1, in_place=False)
        s = vis.hide_(s, everything, everything, r0, r1, c0, c1)
        if edit is not None and edit.sigmoid is not None:
            p = torch.sigmoid(s + edit.sigmoid)
            total = p.sum(-1)
            lse = torch.where(total > 0, total, 1).log().masked_fill(total == 0, -torch.inf)
            return weighted(p, v, c0, c1), lse
        top = s.detach().amax(-1) if width else s.new_full(s.shape[:3], FLOOR)
        top = top.clamp_min(FLOOR)
        empty = top <= FLOOR
        if sinks is not None:
            top = torch.maximum(top, sinks.detach().to(dtype)[None, :, None])
        p = torch.exp(s - top[..., None])
        extra = (
            torch.zeros_like(top)
            if sinks is None
            else torch.exp(sinks.to(dtype)[None, :, None] - top)
        )
        total = (p.sum(-1) + extra).masked_fill(empty, 1.0)
        if len(edits) > 1 and width:
            a, sink = p / total[..., None], (extra / total).masked_fill(empty, 0.0)[..., None]
            for one in edits:
                a, sink = one.edited(a, sink, r0, r1, c0, c1)
            return weighted(a, v, c0, c1), (top + total.log()).masked_fill(empty, -torch.inf)
        if edit is not None and edit.rules and width:
            masses = edit.masses(p, c0, c1) / total[..., None]
            p = edit.scale(p, edit.factors(masses, (extra / total)[..., None], r0, r1), c0, c1)
        return weighted(p, v, c0, c1) / total[..., None], (top + total.log()).masked_fill(
            empty, -torch.inf
        )

    def weighted(p: Tensor, v: Tensor, c0: int, c1: int) -> Tensor:
        n = p.shape[2]
        out = p.reshape(batch, kv_heads, heads // kv_heads * n, c1 - c0) @ v[:, :, c0:c1].to(dtype)
        return out.reshape(batch, heads, n, v.shape[3])

    parts = [
        checkpoint(rows, q, k, v, sinks, r0, min(r0 + _ROWS, lq), use_reentrant=False)
        for r0 in range(0, lq, _ROWS)
    ]
    out, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    for steer in steers:  # where there are several, blends are done
        out = finish(out, v, vis, steer if len(steers) == 1 else Steer(gain=steer.gain))
    return Result(out.to(v.dtype), lse)


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
    """One line: which way `attention` would go, and why."""
    vis = Visibility(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    steers = _prepared(steer, k.shape[2], q.device, request)
    route = choose(q, k, v, vis, softcap, sinks, request, steers)
    if not route.shape:
        return f"streaming: chunked, {route.why}"
    extra = " + exp(q·k − lse) over listed keys" if request.pairs else ""
    one = steers[0] if steers else Steer()
    extra += "".join(
        f" + {name}"
        for name in ("temper", "bias", "blend", "gain")
        if getattr(one, name) is not None
    )
    if route.plan is not None:
        calls = f"{route.plan}, merged by log-sum-exp and the rule"
    elif one.rule is not None:
        cut = segments(one.spans, vis.lk)
        plan = [(s, e) for _, _, _, s, e, _ in spans.pieces(cut, vis, route.shape != "full")]
        wide = sum(e - s > spans.NARROW for s, e in plan)
        counts = [(wide, "vendor SDPA call"), (len(plan) - wide, "small product")]
        calls = " and ".join(f"{n} {what}{'s' * (n > 1)}" for n, what in counts if n)
        calls += " merged by log-sum-exp and the rule"
    else:
        calls = _plain_calls(route)
    return f"streaming: {calls}{' + sink' if sinks is not None else ''}{extra} ({route.why})"


def _plain_calls(route: Route) -> str:
    return (
        "two vendor SDPA calls merged by log-sum-exp" if route.shape == "prefix" else "vendor SDPA"
    )
