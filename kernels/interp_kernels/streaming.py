"""Attention and its statistics in O(L · chunk) memory: any device, any mask, differentiable.

`choose` says which of two ways a call goes: the vendor's fused call (plus a few exp(q·k − lse) for `pair_mass`), or
chunks of query rows over the keys they see, where one product with [V | labels | 1 | positions] gives most statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import vendor
from .chunked import run_chunks
from .masking import FLOOR, Visibility, compute_dtype
from .pairs import pair_mass
from .spec import Mask, Request, Result

#: Query rows a chunk of the differentiable path.
_ROWS = 128


@dataclass(frozen=True)
class Route:
    """`shape` of the vendor calls, "" for chunks; `why` in words."""

    shape: str
    why: str


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def choose(
    q: Tensor, k: Tensor, v: Tensor, vis: Visibility, softcap: float | None, sinks: Tensor | None, request: Request
) -> Route:
    shape, why = vendor.shape_of(vis, q, k, v, softcap)
    if shape and not request.cheap:
        wanted = sorted(request.names - {"pair_mass"}) + ["received"] * bool(request.received)
        return Route("", f"{', '.join(wanted + ['topk'] * bool(request.topk))} need a pass over all keys")
    if shape and _needs_grad(q, k, v, sinks) and (shape == "prefix" or sinks is not None):
        return Route("", "the vendor's log-sum-exp has no gradient and merging needs one")
    return Route(shape, why if shape else f"because {why}")


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
) -> Result:
    """As `reference.attention`; never holds a (queries, keys) matrix. Gradients flow through `out` (not `lse`, where
    the vendor computes it); statistics are computed without gradients, in a pass of their own if some are needed."""
    request = request or Request()
    if _needs_grad(q, k, v, sinks, mask.dense) and request:
        result = attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks)
        with torch.no_grad():
            seen = attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, request=request)
        return Result(result.out, result.lse, seen.stats)
    vis = Visibility(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    route = choose(q, k, v, vis, softcap, sinks, request)
    if not route.shape:
        if _needs_grad(q, k, v, sinks, mask.dense):
            return _differentiable(q, k, v, vis, scale, softcap, sinks)
        with torch.no_grad():
            return run_chunks(q, k, v, vis=vis, scale=scale, softcap=softcap, sinks=sinks, request=request)
    out, lse = vendor.attend(q, k, v, vis=vis, shape=route.shape, scale=scale)
    if sinks is not None:
        out, lse = vendor.add_sink(out, lse, sinks)
    stats = {}
    with torch.no_grad():
        for name, index in request.pairs.items():
            stats[f"pair_mass:{name}"] = pair_mass(q, k, lse, index, vis=vis, scale=scale)
    return Result(out, lse, stats)


def _differentiable(
    q: Tensor, k: Tensor, v: Tensor, vis: Visibility, scale: float, softcap: float | None, sinks: Tensor | None
) -> Result:
    """Chunks of rows under activation checkpointing, so that the backward pass is O(L · chunk) as well."""
    dtype = compute_dtype(q, k, v)
    batch, heads, lq, d = q.shape
    kv_heads = k.shape[1]
    everything = slice(None)

    def rows(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, r0: int, r1: int) -> tuple[Tensor, Tensor]:
        c0, c1 = vis.span(r0, r1)
        n, width = r1 - r0, c1 - c0
        # Query heads of one kv head side by side, so that keys are not repeated: (batch, kv_heads, group · rows, d)
        side = heads // kv_heads * n
        queries = (q[:, :, r0:r1].to(dtype) * scale).reshape(batch, kv_heads, side, d)
        s = (queries @ k[:, :, c0:c1].to(dtype).transpose(-1, -2)).reshape(batch, heads, n, width)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        s = vis.hide_(s, everything, everything, r0, r1, c0, c1)
        top = s.detach().amax(-1) if width else s.new_full(s.shape[:3], FLOOR)
        top = top.clamp_min(FLOOR)
        empty = top <= FLOOR
        if sinks is not None:
            top = torch.maximum(top, sinks.detach().to(dtype)[None, :, None])
        p = torch.exp(s - top[..., None])
        total = p.sum(-1)
        if sinks is not None:
            total = total + torch.exp(sinks.to(dtype)[None, :, None] - top)
        total = total.masked_fill(empty, 1.0)
        out = (p.reshape(batch, kv_heads, side, width) @ v[:, :, c0:c1].to(dtype)).reshape(batch, heads, n, -1)
        return out / total[..., None], (top + total.log()).masked_fill(empty, -torch.inf)

    parts = [
        checkpoint(rows, q, k, v, sinks, r0, min(r0 + _ROWS, lq), use_reentrant=False) for r0 in range(0, lq, _ROWS)
    ]
    out, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return Result(out.to(v.dtype), lse)


def explain_route(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, softcap: float | None, sinks: Tensor | None, request: Request
) -> str:
    """One line: which way `attention` would go, and why."""
    vis = Visibility(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    route = choose(q, k, v, vis, softcap, sinks, request)
    if not route.shape:
        return f"streaming: chunked, {route.why}"
    extra = " + exp(q·k − lse) over listed keys" if request.pairs else ""
    calls = "two vendor SDPA calls merged by log-sum-exp" if route.shape == "prefix" else "vendor SDPA"
    return f"streaming: {calls}{' + sink' if sinks is not None else ''}{extra} ({route.why})"
