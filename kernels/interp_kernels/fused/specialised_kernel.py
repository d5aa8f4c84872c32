"""The forward of plain calls with its warps specialised: some copy tiles, the others do the softmax
and keep the statistics.

The algebra is `forward_kernel`'s. Hopper's automatic warp specialisation compiles for one loop
whose tiles come through descriptors (the copy engine), at four warps: so every tile is masked, and
two warp groups share a tile's rows. Entropy and the column of the maximum stay in the registers of
the warps that do the softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward_kernel import weights_times
from .primitives import FLOOR, HIDDEN, dot

_BIG = tl.constexpr(2147483647)


@triton.jit
def _tile(  # noqa: PLR0913
    start, acc, m, norm, e, best, q, k_desc, v_desc, last, scale,
    BM: tl.constexpr, BN: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr,
    INTERP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after the keys start … start + BN."""
    at = tl.arange(0, BN)
    k = k_desc.load([start, 0])  # (BN, D)
    s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), INTERP, PRECISION)  # (BM, BN)
    # one comparison with a constant an element
    s = tl.where(at[None, :] <= (last - start)[:, None], s, HIDDEN / scale)
    top = tl.max(s, 1)  # (BM,)
    new = tl.maximum(m, top * scale)
    t = s * scale - new[:, None]
    p = tl.exp2(t)
    alpha = tl.exp2(m - new)
    if ARGMAX:
        column = start + tl.min(tl.where(s == top[:, None], at[None, :], _BIG), 1)
        best = tl.where(new > m, column, best)  # an earlier tile keeps equal ones
    if ENTROPY:
        e = (e + norm * (m - new)) * alpha + tl.sum(p * t, 1)
    norm = norm * alpha + tl.sum(p, 1)
    v = v_desc.load([start, 0])  # (BN, D)
    acc = weights_times(p, v, acc * alpha[:, None], INTERP, PRECISION)
    return acc, new, norm, e, best


@triton.jit
def specialised_kernel(  # noqa: PLR0913
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, entropy_ptr, max_ptr, argmax_ptr,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m,
    lq, lk, off, scale, n_kv,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, ENTROPY: tl.constexpr, MAX: tl.constexpr, ARGMAX: tl.constexpr,
    SPECIALISE: tl.constexpr, INTERP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program is BM query rows of one head, in `forward_kernel`'s order."""
    pid = tl.program_id(0)
    n_m = tl.cdiv(lq, BM)
    group = pid % GROUP
    block = n_m - 1 - (pid // GROUP) % n_m
    kv = (pid // (GROUP * n_m)) % n_kv
    batch = (pid // (GROUP * n_m * n_kv)).to(tl.int64)
    head = kv * GROUP + group

    r0 = block * BM
    rows = r0 + tl.arange(0, BM)  # (BM,)
    row_ok = rows < lq
    q_at = q_ptr + batch * q_b + head.to(tl.int64) * q_h
    k_at = k_ptr + batch * k_b + kv.to(tl.int64) * k_h
    v_at = v_ptr + batch * v_b + kv.to(tl.int64) * v_h
    q_desc = tl.make_tensor_descriptor(q_at, [lq, D], [q_m, 1], [BM, D])
    k_desc = tl.make_tensor_descriptor(k_at, [lk, D], [k_n, 1], [BN, D])
    v_desc = tl.make_tensor_descriptor(v_at, [lk, D], [v_n, 1], [BN, D])
    q = q_desc.load([r0, 0])  # (BM, D)

    acc = tl.zeros([BM, D], tl.float32)
    m = tl.full([BM], FLOOR, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    e = tl.zeros([BM], tl.float32)
    best = tl.full([BM], -1, tl.int32)
    hi = lk
    last = tl.full([BM], 0, tl.int32) + (lk - 1)  # the last column that each row sees
    if CAUSAL:
        hi = tl.maximum(tl.minimum(lk, r0 + BM + off), 0)
        last = tl.minimum(last, rows + off)
    if SPECIALISE:
        for start in tl.range(0, hi, BN, warp_specialize=True):
            acc, m, norm, e, best = _tile(
                start, acc, m, norm, e, best, q, k_desc, v_desc, last, scale,
                BM, BN, ENTROPY, ARGMAX, INTERP, PRECISION,
            )  # fmt: skip
    else:
        for start in tl.range(0, hi, BN):
            acc, m, norm, e, best = _tile(
                start, acc, m, norm, e, best, q, k_desc, v_desc, last, scale,
                BM, BN, ENTROPY, ARGMAX, INTERP, PRECISION,
            )  # fmt: skip

    empty = norm <= 0.0
    lse = m + tl.log2(tl.where(empty, 1.0, norm))
    inverse = tl.where(empty, 0.0, tl.exp2(m - lse))
    flat = (batch * (n_kv * GROUP) + head) * lq + rows  # of a (batch, heads, queries) tensor
    tl.store(lse_ptr + flat, tl.where(empty, float("-inf"), lse * 0.6931471805599453), mask=row_ok)
    share = norm * inverse
    if ENTROPY:
        # −Σ A ln A with ln A = ln2·(t + m − lse)
        tl.store(
            entropy_ptr + flat, 0.6931471805599453 * (share * (lse - m) - e * inverse), mask=row_ok
        )
    if MAX:
        tl.store(max_ptr + flat, tl.minimum(inverse, share), mask=row_ok)
    if ARGMAX:
        tl.store(argmax_ptr + flat, tl.where(empty, -1, best).to(tl.int64), mask=row_ok)
    dims = tl.arange(0, D)[None, :]
    out_at = out_ptr + batch * o_b + head.to(tl.int64) * o_h + rows.to(tl.int64)[:, None] * o_m
    out = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_at + dims, out, mask=row_ok[:, None])
