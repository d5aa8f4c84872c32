"""Σ_i w_i·ô_i over pieces of rows, with its backward: one pass over the outputs each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import INTERPRETED, device_of, padded_dim


@triton.jit
def weighted_kernel(  # noqa: PLR0913
    outs, weights, starts, stops, o_bs, o_hs, o_ms, out_ptr, r_b, r_h, r_m, lq, heads,
    N: tl.constexpr, BM: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """out = Σ_i w_i·ô_i; a program is BM rows of one head."""
    pid = tl.program_id(0)
    n_m = tl.cdiv(lq, BM)
    rows = (pid % n_m) * BM + tl.arange(0, BM)
    head = ((pid // n_m) % heads).to(tl.int64)
    batch = (pid // (n_m * heads)).to(tl.int64)
    cols = tl.arange(0, DVP)
    out = tl.zeros([BM, DVP], tl.float32)
    for i in tl.static_range(N):
        inside = (rows >= starts[i]) & (rows < stops[i])
        at = (batch * heads + head) * (stops[i] - starts[i]) + rows - starts[i]
        w = tl.load(weights[i] + at, mask=inside, other=0.0)
        o_at = (
            outs[i]
            + batch * o_bs[i]
            + head * o_hs[i]
            + (rows - starts[i]).to(tl.int64)[:, None] * o_ms[i]
        )
        o = tl.load(
            o_at + cols[None, :], mask=inside[:, None] & (cols[None, :] < DV), other=0.0
        )  # (BM, DVP)
        out += tl.where(w[:, None] != 0, w[:, None] * o.to(tl.float32), 0.0)
    out_at = out_ptr + batch * r_b + head * r_h + rows.to(tl.int64)[:, None] * r_m + cols[None, :]
    tl.store(
        out_at, out.to(out_ptr.dtype.element_ty), mask=(rows < lq)[:, None] & (cols[None, :] < DV)
    )


@triton.jit
def weighted_backward_kernel(  # noqa: PLR0913
    out_ptr, weight_ptr, grad_ptr, d_out_ptr, d_weight_ptr,
    o_b, o_h, o_m, g_b, g_h, g_m, d_b, d_h, d_m, start, n_rows, heads,
    BM: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """∂ô = w·∂out and ∂w = ⟨ô, ∂out⟩ of one piece; a program is BM of its rows of one head."""
    pid = tl.program_id(0)
    n_m = tl.cdiv(n_rows, BM)
    rows = (pid % n_m) * BM + tl.arange(0, BM)
    head = ((pid // n_m) % heads).to(tl.int64)
    batch = (pid // (n_m * heads)).to(tl.int64)
    cols = tl.arange(0, DVP)[None, :]
    inside = rows < n_rows
    both = inside[:, None] & (cols < DV)
    down = rows.to(tl.int64)[:, None]
    at = (batch * heads + head) * n_rows + rows
    grad = tl.load(
        grad_ptr + batch * g_b + head * g_h + (down + start) * g_m + cols, mask=both, other=0.0
    )
    grad = grad.to(tl.float32)  # (BM, DVP)
    w = tl.load(weight_ptr + at, mask=inside, other=0.0)
    o = tl.load(out_ptr + batch * o_b + head * o_h + down * o_m + cols, mask=both, other=0.0).to(
        tl.float32
    )
    tl.store(d_weight_ptr + at, tl.sum(grad * o, 1), mask=inside)
    d_at = d_out_ptr + batch * d_b + head * d_h + down * d_m + cols
    tl.store(d_at, (w[:, None] * grad).to(d_out_ptr.dtype.element_ty), mask=both)


def _rows(d_v: int) -> int:
    return 16 if INTERPRETED else max(16, min(64, 8192 // padded_dim(d_v)))


class Weighted(torch.autograd.Function):
    """weighted(queries, starts, w_0 … w_n, ô_0 … ô_n): w_i (batch, heads, rows) float32, ô_i
    (batch, heads, rows, d_v); rows start_i … of the result (batch, heads, queries, d_v)."""

    @staticmethod
    def forward(ctx: Any, queries: int, starts: tuple[int, ...], *given: Tensor) -> Tensor:
        n = len(starts)
        weights = [w.contiguous() for w in given[:n]]
        outs = [o if o.stride(-1) == 1 else o.contiguous() for o in given[n:]]
        ctx.starts = starts
        ctx.save_for_backward(*weights, *outs)
        batch, heads, _, d_v = outs[0].shape
        out = outs[0].new_empty(batch, queries, heads, d_v).transpose(1, 2)
        rows = _rows(d_v)
        with device_of(out):
            weighted_kernel[(-(-queries // rows) * heads * batch,)](
                tuple(outs),
                tuple(weights),
                starts,
                tuple(s + o.shape[2] for s, o in zip(starts, outs, strict=True)),
                *(tuple(o.stride(i) for o in outs) for i in range(3)),
                out,
                *out.stride()[:3],
                queries,
                heads,
                N=n,
                BM=rows,
                DV=d_v,
                DVP=padded_dim(d_v),
                num_warps=4,
                enable_fp_fusion=True,
            )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        n = len(ctx.starts)
        weights, outs = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        d_weights, d_outs = [], []
        for start, w, o in zip(ctx.starts, weights, outs, strict=True):
            batch, heads, n_rows, d_v = o.shape
            d_w, d_o = (
                torch.empty_like(w),
                torch.empty_like(o, memory_format=torch.contiguous_format),
            )
            rows = _rows(d_v)
            with device_of(o):
                weighted_backward_kernel[(-(-n_rows // rows) * heads * batch,)](
                    o,
                    w,
                    grad,
                    d_o,
                    d_w,
                    *o.stride()[:3],
                    *grad.stride()[:3],
                    *d_o.stride()[:3],
                    start,
                    n_rows,
                    heads,
                    BM=rows,
                    DV=d_v,
                    DVP=padded_dim(d_v),
                    num_warps=4,
                    enable_fp_fusion=True,
                )
            d_weights.append(d_w)
            d_outs.append(d_o)
        return None, None, *d_weights, *d_outs
