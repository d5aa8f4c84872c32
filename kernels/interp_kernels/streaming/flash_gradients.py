"""Gradients of queries, keys and values by the vendor's own backward pass, in O(L) memory.

The CPU's fused call returns the log-sum-exp without a gradient, and what is merged from several
calls (a cached prefix, a sink logit, a rule over groups) needs one. With p the weights and
δ = Σ dO·O of a row, the backward pass computes dS = p·(dO·v − δ); a gradient dL of the log-sum-exp
adds p·dL. So δ − dL in place of δ is all that is wanted, and columns behind the last give it:

    O' = [O | −dL]        dO' = [dO | 1]        v' = [v | 0]        dO'·v' = dO·v

(dL as two numbers of 16 bits where that is the type.) On other devices what needs no merge goes to
`scaled_dot_product_attention` as it is; hidden keys are columns there too, q' = [q | 1] and
k' = [k | −1e30], because a mask would be (queries, keys).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call

#: The binding costs 2 µs a call less than the same operator of `torch.ops`, where torch has it.
FUSED = getattr(
    torch,
    "_scaled_dot_product_flash_attention_for_cpu",
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
#: Columns beside the head's own: vendors like multiples of eight.
_MORE = 8
#: The largest head dimension of the vendors' fused calls.
_MAX_DIM = 256
#: So many keys before the first query row, for each row, are still worth rows that are thrown away.
_PREFIX = 3


class Flash(torch.autograd.Function):
    """The CPU's fused call, out and natural log-sum-exp, with the gradients of both."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = FUSED(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, bias, ctx.scale, ctx.causal = inputs
        ctx.save_for_backward(q, k, v, bias, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * 6
        d_out = torch.zeros_like(out) if d_out is None else d_out
        d = q.shape[3]
        if d_lse is not None:
            q, k, v, out, d_out = (F.pad(x, (0, _MORE)) for x in (q, k, v, out, d_out))
            high = (-d_lse).to(out.dtype)
            out[..., d], out[..., d + 1] = high, (-d_lse - high.to(d_lse)).to(out.dtype)
            d_out[..., d : d + 2] = 1.0
        grads = _BACKWARD(
            d_out.contiguous(), q, k, v, out, lse, 0.0, ctx.causal, attn_mask=bias, scale=ctx.scale
        )
        dq, dk, dv = (x[..., :d] for x in grads)
        return dq, dk, dv, None, None, None


def why_not(call: Call, shape: str) -> str:
    """Why `scaled_dot_product_attention` with its own backward can't stand in for the call on this
    device, "" if it can; `shape` as `vendor.geometry` gives it."""
    one, d = call.steer, max(call.q.shape[3], call.v.shape[3])
    if not shape:
        return "the mask is no square, whole or prefix"
    if call.request:
        return "statistics are asked for"
    if call.softcap is not None or call.mask.dense is not None or call.sinks is not None:
        return "soft-caps, dense masks and sinks are not the vendor's"
    if one.rule is not None or one.sigmoid is not None or one.bias is not None:
        return "the edit changes weights"
    if len(call.steers) > 1:
        return "the edits don't fuse into one"
    if one.temper is not None and call.q.dtype not in (torch.float32, torch.float64):
        return "steer.temper would round the queries once more"
    if d + (_MORE if call.vis.keys is not None else 0) > _MAX_DIM:
        return f"heads of dimension {d} are too wide"
    if shape == "prefix" and call.vis.span(0, call.vis.lq)[1] > (1 + _PREFIX) * call.vis.lq:
        return "there are few queries behind a long prefix"
    return ""


def attend(call: Call, shape: str) -> Tensor:
    """out (batch, heads, queries, d_v), differentiable in q, k and v; 0 for rows that see nothing.
    What precedes the first query row stands over rows that are thrown away again, so that the call
    is a square: a mask would be (queries, keys)."""
    q, k, v, vis, scale = call.q, call.k, call.v, call.vis, call.scale
    lq, d_v = vis.lq, v.shape[3]
    width = max(q.shape[3], d_v)
    if scale <= 0:
        q, scale = q * scale, 1.0
    q, k, v = (F.pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (q, k, v))
    if vis.keys is not None:
        hide = -6e4 if k.dtype == torch.float16 else -1e30
        columns = torch.where(vis.keys, 0.0, hide).to(k)[:, None, :, None]
        k = torch.cat([k, columns.expand(-1, k.shape[1], -1, _MORE)], 3)
        q, v = F.pad(q, (0, _MORE), value=1.0), F.pad(v, (0, _MORE))
    causal = shape != "full"
    if causal:
        seen = vis.span(0, lq)[1]  # a static cache's end is empty
        k, v, q = k[:, :, :seen], v[:, :, :seen], F.pad(q, (0, 0, seen - lq, 0))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    out = out[:, :, -lq:, :d_v]
    if vis.keys is None:
        return out
    return out.masked_fill((vis.row_counts() == 0)[:, None, :, None], 0.0)
