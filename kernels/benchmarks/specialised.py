"""An experiment for the benchmark: the plain causal forward with tiles moved by the copy engine
(TMA).

Two variants that need descriptors instead of pointers: the shipped two-loop order, and Hopper's
automatic warp specialisation, which compiles only for one loop, four warps and a mask that is
always applied. They are timed beside the shipped kernel (`kernel_times.py`); what measures faster
replaces it. Device-side descriptors, so no launch cost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from interp_kernels.fused.forward_kernel import weights_times
from interp_kernels.fused.primitives import INTERPRETED, LOG2E, dot


@triton.jit
def descriptor_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_h, q_m, k_h, k_n, v_h, v_n, o_h, o_m, length, scale,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, SPECIALISE:
    tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One causal square of batch 1; a program is BM rows of one head."""
    pid = tl.program_id(0)
    n_m = tl.cdiv(length, BM)
    head = pid % GROUP + (pid // (GROUP * n_m)) * GROUP
    block = n_m - 1 - (pid // GROUP) % n_m
    kv = head // GROUP
    r0 = block * BM
    q_desc = tl.make_tensor_descriptor(
        q_ptr + head.to(tl.int64) * q_h, [length, D], [q_m, 1], [BM, D]
    )
    k_desc = tl.make_tensor_descriptor(
        k_ptr + kv.to(tl.int64) * k_h, [length, D], [k_n, 1], [BN, D]
    )
    v_desc = tl.make_tensor_descriptor(
        v_ptr + kv.to(tl.int64) * v_h, [length, D], [v_n, 1], [BN, D]
    )
    o_desc = tl.make_tensor_descriptor(
        out_ptr + head.to(tl.int64) * o_h, [length, D], [o_m, 1], [BM, D]
    )
    q = q_desc.load([r0, 0])  # (BM, D)
    rows = r0 + tl.arange(0, BM)
    offs = tl.arange(0, BN)
    acc = tl.zeros([BM, D], tl.float32)
    m = tl.full([BM], -1e29, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    hi = tl.minimum(r0 + BM, length)
    if SPECIALISE:
        for start in tl.range(0, hi, BN, warp_specialize=True):
            k = k_desc.load([start, 0])  # (BN, D)
            s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), INTERP, "tf32")
            s = tl.where(rows[:, None] >= (start + offs)[None, :], s, -1e31)
            new = tl.maximum(m, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new[:, None])
            alpha = tl.exp2(m - new)
            norm = norm * alpha + tl.sum(p, 1)
            v = v_desc.load([start, 0])  # (BN, D)
            acc = weights_times(p, v, acc * alpha[:, None], INTERP, "tf32")
            m = new
    else:
        full = r0 // BN * BN
        for start in tl.range(0, full, BN):
            k = k_desc.load([start, 0])
            s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), INTERP, "tf32")
            new = tl.maximum(m, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new[:, None])
            alpha = tl.exp2(m - new)
            norm = norm * alpha + tl.sum(p, 1)
            v = v_desc.load([start, 0])
            acc = weights_times(p, v, acc * alpha[:, None], INTERP, "tf32")
            m = new
        for start in tl.range(full, hi, BN):
            k = k_desc.load([start, 0])
            s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), INTERP, "tf32")
            s = tl.where(rows[:, None] >= (start + offs)[None, :], s, -1e31)
            new = tl.maximum(m, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new[:, None])
            alpha = tl.exp2(m - new)
            norm = norm * alpha + tl.sum(p, 1)
            v = v_desc.load([start, 0])
            acc = weights_times(p, v, acc * alpha[:, None], INTERP, "tf32")
            m = new
    tl.store(
        lse_ptr + head * length + rows, (m + tl.log2(norm)) * 0.6931471805599453, mask=rows < length
    )
    o_desc.store([r0, 0], (acc / norm[:, None]).to(out_ptr.dtype.element_ty))


#: name → (specialise, rows, keys, warps, stages)
VARIANTS = {
    "descriptors, two loops": (False, 128, 128, 8, 2),
    "descriptors, two loops, narrow": (False, 128, 64, 8, 3),
    "warp-specialised": (True, 128, 128, 4, 2),
    "warp-specialised, narrow": (True, 128, 64, 4, 3),
}


def run(
    variant: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, ...]:
    """(out, lse) of a plain causal square; q, k, v (1, heads or kv_heads, length, d), 16-bit, last
    stride 1."""
    specialise, rows, cols, warps, stages = VARIANTS[variant]
    if INTERPRETED:
        rows = cols = 32
    _, heads, length, d = q.shape
    out = torch.empty(1, length, heads, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(1, heads, length, dtype=torch.float32, device=q.device)
    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=q.device)
    )
    descriptor_kernel[(-(-length // rows) * heads,)](
        q,
        k,
        v,
        out,
        lse,
        *q.stride()[1:3],
        *k.stride()[1:3],
        *v.stride()[1:3],
        *out.stride()[1:3],
        length,
        scale * LOG2E,
        GROUP=heads // k.shape[1],
        BM=rows,
        BN=cols,
        D=d,
        SPECIALISE=specialise,
        INTERP=INTERPRETED,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    return out, lse
