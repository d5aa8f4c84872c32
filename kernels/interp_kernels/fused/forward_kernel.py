"""One pass over the keys: the output, the log-sum-exp and the statistics of each row, as they
stream by.

With t = s − m (base 2, m the running maximum) and p = 2^t the state of a row is m, norm = Σ p, acc
= Σ p·v, and, where asked, e = Σ p·t, Σ p·(k − q₀), Σ p by group, the column of m. A new maximum m'
rescales all by α = 2^(m − m') and moves e ← (e + norm·(m − m'))·α: the entropy stays a sum of small
numbers (lse − E[s] would cancel). Every statistic is a compile-time flag; what is not asked costs
nothing.

Feature sums of 16-bit inputs carry the rounding of p to fp16, 2⁻¹² of each weight; all else is
float32.

Keys come as a range, cut into tiles some rows see in part (masked) and tiles all rows see (no mask
at all), or as a list a head (`listed`: the scattered keys of one group). Steering before the
softmax happens here; rules after it are made of several such states by `merge`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import FLOOR, HIDDEN, dot, reach, seen, soft_cap, tile

_BIG = tl.constexpr(2147483647)


@triton.jit
def weights_times(p, v, acc, INTERP: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p @ v, p rounded to v's type as tensor cores want it (not under the interpreter)."""
    if INTERP:
        return dot(p, v, acc, INTERP, PRECISION)
    else:
        return dot(p.to(v.dtype), v, acc, INTERP, PRECISION)


@triton.jit
def _store(out_at, value, row_ok, FROM: tl.constexpr, SIZE: tl.constexpr, DV: tl.constexpr):
    """value (BM, SIZE) as the dimensions FROM … of rows at out_at (BM, 1)."""
    dims = FROM + tl.arange(0, SIZE)[None, :]
    tl.store(out_at + dims, value.to(out_at.dtype.element_ty), mask=row_ok[:, None] & (dims < DV))


@triton.jit
def _tiles(
    acc, acc2, m, norm, e, far, near, best, mass,
    q, q2, temper, rows, row_ok, off, first,
    k_ptr, v_ptr, keep_ptr, dirty_ptr, bias_ptr, dense_at, feature_ptr, list_ptr,
    k_n, k_d, v_n, v_d, keep_n, bias_n, dense_n,
    lo, hi, lk, window, keep0, keep1, cap, scale, softcap, sigmoid,
    BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DP2: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, DVP2: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEPT: tl.constexpr,
    KEEP: tl.constexpr, LISTED: tl.constexpr, DENSE: tl.constexpr, DENSE_HIDES: tl.constexpr,
    SOFTCAP: tl.constexpr, TEMPER: tl.constexpr, BIAS: tl.constexpr, HIDES: tl.constexpr,
    SIGMOID: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, DISTANCE: tl.constexpr,
    CAPPED: tl.constexpr, FEATURES: tl.constexpr, INTERP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after the keys lo … hi (multiples of BN, or a list of hi columns). DENSE: 1 for a
    mask of flags, 2 for a bias, at dense_at (BM, 1) and dense_n."""
    # without anything between the product and the softmax, scaling fuses with the subtraction: one
    # fma an element
    FUSED: tl.constexpr = not (SOFTCAP or TEMPER or BIAS or SIGMOID or DENSE == 2)
    offs_n = tl.arange(0, BN)
    hidden = HIDDEN / scale if FUSED else HIDDEN
    for start in tl.range(lo, hi, BN):
        start = tl.multiple_of(start, BN)
        if LISTED:
            inside = start + offs_n < hi
            cols = tl.load(list_ptr + start + offs_n, mask=inside, other=0)
            at = cols.to(tl.int64)
            k_at = at[None, :] * k_n
            v_at = at[:, None] * v_n
            k_from = k_ptr
            v_from = v_ptr
        else:
            cols = start + offs_n
            inside = cols < lk
            k_at = offs_n[None, :] * k_n
            v_at = offs_n[:, None] * v_n
            k_from = k_ptr + start.to(tl.int64) * k_n
            v_from = v_ptr + start.to(tl.int64) * v_n
        # a list's last tile reads column 0 where it ends; tiles of a range are cut by the last key
        CUT: tl.constexpr = MASK and not LISTED
        k = tile(k_from, k_at, k_d, inside, 0, DP, D, CUT, True)  # (DP, BN)
        s = dot(q, k, tl.zeros([q.shape[0], BN], tl.float32), INTERP, PRECISION)  # (BM, BN)
        if DP2:
            k2 = tile(k_from, k_at, k_d, inside, DP, DP2, D, CUT, True)
            s = dot(q2, k2, s, INTERP, PRECISION)

        if not FUSED:
            s = s * scale
        if SOFTCAP:
            s = soft_cap(s, softcap)
        if TEMPER:
            s = s * temper[:, None]
        if BIAS:
            # float32 first: in float16 HIDDEN is −inf, and −inf · 0 in the entropy NaN
            bias = tl.load(bias_ptr + cols * bias_n, mask=inside, other=0.0).to(tl.float32)
            s = s + tl.where(bias > HIDES, bias * 1.4426950408889634, HIDDEN)[None, :]
        if DENSE:
            dense = tl.load(
                dense_at + cols[None, :].to(tl.int64) * dense_n,
                mask=row_ok[:, None] & inside[None, :],
                other=0,
            )  # (BM, BN)
            if DENSE == 1:
                s = tl.where(dense != 0, s, hidden)
            else:
                dense = dense.to(tl.float32)
                s = s + tl.where(dense > DENSE_HIDES, dense * 1.4426950408889634, HIDDEN)
        if MASK:
            ok = seen(
                rows[:, None], cols[None, :], off, lk, window, keep0, keep1, CAUSAL, WINDOW, KEPT
            )
            if LISTED:
                ok = ok & inside[None, :]
            s = tl.where(ok, s, hidden)
        if KEEP:  # noqa: SIM102 (one is for the compiler: most tiles hide nothing, and skip this)
            if tl.load(dirty_ptr + start // BN) != 0:
                shown = tl.load(keep_ptr + cols * keep_n, mask=inside, other=0)
                s += tl.where(shown != 0, 0.0, hidden)[None, :]

        if SIGMOID:
            p = 1.0 / (1.0 + tl.exp2(tl.minimum(-s - sigmoid, 126.0)))
            if MASK or KEEP or BIAS or DENSE:  # what is hidden
                p = tl.where(s > FLOOR, p, 0.0)
            norm += tl.sum(p, 1)
        else:
            top = tl.max(s, 1)  # (BM,)
            new = tl.maximum(m, top * scale if FUSED else top)
            if FUSED:
                t = s * scale - new[:, None]
            else:
                t = s - new[:, None]
            p = tl.exp2(t)
            alpha = tl.exp2(m - new)
            if ARGMAX:
                better = new > m  # an earlier tile keeps equal ones
                if (
                    tl.max(better.to(tl.int32), 0) != 0
                ):  # rare after the first tiles, and three instructions an element
                    column = tl.min(tl.where(s == top[:, None], start + offs_n[None, :], _BIG), 1)
                    best = tl.where(better, column, best)
            if ENTROPY:
                e = (e + norm * (m - new)) * alpha + tl.sum(p * t, 1)
            gained = tl.sum(p, 1)
            if DISTANCE:
                if CAUSAL:  # of the tile's middle; the rest is a feature
                    far = far * alpha + gained * (start + BN // 2 - first).to(tl.float32)
                else:
                    far = far * alpha + tl.sum(
                        p * tl.abs(rows[:, None] + off - cols[None, :]).to(tl.float32), 1
                    )
            if CAPPED:
                near = near * alpha
                if MASK or not CAUSAL:
                    close = cap - tl.abs(rows[:, None] + off - cols[None, :])
                    near += tl.sum(p * tl.maximum(close, 0).to(tl.float32), 1)
            if FEATURES:
                f_at = feature_ptr + start.to(tl.int64) * FEATURES
                f_at += offs_n[:, None] * FEATURES + tl.arange(0, FEATURES)[None, :]
                features = (
                    tl.load(f_at, mask=inside[:, None], other=0.0) if MASK else tl.load(f_at)
                )  # (BN, F)
                mass = weights_times(p, features, mass * alpha[:, None], INTERP, PRECISION)
            norm = norm * alpha + gained
            acc = acc * alpha[:, None]
            if DVP2:
                acc2 = acc2 * alpha[:, None]
            m = new

        v = tile(v_from, v_at, v_d, inside, 0, DVP, DV, CUT, False)  # (BN, DVP)
        acc = weights_times(p, v, acc, INTERP, PRECISION)
        if DVP2:
            v2 = tile(v_from, v_at, v_d, inside, DVP, DVP2, DV, CUT, False)
            acc2 = weights_times(p, v2, acc2, INTERP, PRECISION)
    return acc, acc2, m, norm, e, far, near, best, mass


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    entropy_ptr, max_ptr, argmax_ptr, distance_ptr, capped_ptr, mass_ptr,
    keep_ptr, dirty_ptr, ends_ptr, real_ptr, sink_ptr, temper_ptr, bias_ptr, dense_ptr, start_ptr,
    feature_ptr, list_ptr, count_ptr,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_m,
    keep_b, keep_h, keep_n, dirty_b, dirty_h, real_b, temper_b, temper_h, temper_m, bias_b, bias_h,
    bias_n, dense_b, dense_h, dense_m, dense_n,
    list_b, list_h,
    lq, lk, off, window, keep_first, cap, scale, softcap, sigmoid, n_kv,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DP2: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    DVP2: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEPT: tl.constexpr, KEEP: tl.constexpr,
    LISTED: tl.constexpr, DENSE: tl.constexpr, DENSE_HIDES: tl.constexpr, SINK: tl.constexpr,
    SOFTCAP: tl.constexpr, TEMPER: tl.constexpr, BIAS: tl.constexpr, HIDES: tl.constexpr,
    SIGMOID: tl.constexpr, REAL: tl.constexpr,
    ENTROPY: tl.constexpr, MAX: tl.constexpr, ARGMAX: tl.constexpr, DISTANCE: tl.constexpr, CAPPED:
    tl.constexpr,
    GROUPS: tl.constexpr, FEATURES: tl.constexpr, INTERP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program is BM query rows of one head. Heads of one kv head run side by side, so that its
    keys stay in L2, and the longest rows first, so that no long one is left for the end."""
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
    q_from = q_ptr + batch * q_b + head.to(tl.int64) * q_h + r0.to(tl.int64) * q_m
    q_at = tl.arange(0, BM)[:, None] * q_m
    q = tile(q_from, q_at, q_d, row_ok, 0, DP, D, True, False)  # (BM, DP)
    q2 = row_ok
    if DP2:
        q2 = tile(q_from, q_at, q_d, row_ok, DP, DP2, D, True, False)  # (BM, DP2)
    temper = row_ok
    if TEMPER:
        temper = tl.load(
            temper_ptr + batch * temper_b + head * temper_h + rows * temper_m,
            mask=row_ok,
            other=0.0,
        ).to(tl.float32)

    k_at = k_ptr + batch * k_b + kv.to(tl.int64) * k_h
    v_at = v_ptr + batch * v_b + kv.to(tl.int64) * v_h
    keep_at = keep_ptr
    dirty_at = dirty_ptr
    if KEEP:
        keep_at = keep_ptr + batch * keep_b + head.to(tl.int64) * keep_h
        dirty_at = dirty_ptr + batch * dirty_b + head.to(tl.int64) * dirty_h
    bias_at = bias_ptr
    if BIAS:
        bias_at = bias_ptr + batch * bias_b + head.to(tl.int64) * bias_h
    dense_at = dense_ptr
    if DENSE:
        dense_at = dense_ptr + batch * dense_b + head.to(tl.int64) * dense_h
        dense_at += rows.to(tl.int64)[:, None] * dense_m  # (BM, 1)
    keep0 = 0
    keep1 = 0
    if KEPT:
        keep0 = tl.load(start_ptr + batch)
        keep1 = keep0 + keep_first
    feature_at = feature_ptr
    if FEATURES:
        feature_at = feature_ptr + batch * lk * FEATURES
    list_at = list_ptr
    if LISTED:
        list_at = list_ptr + batch * list_b + head.to(tl.int64) * list_h

    acc = tl.zeros([BM, DVP], tl.float32)
    acc2 = tl.zeros([BM, DVP2 if DVP2 else 1], tl.float32)
    m = tl.full([BM], FLOOR, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    e = tl.zeros([BM], tl.float32)
    far = tl.zeros([BM], tl.float32)
    near = tl.zeros([BM], tl.float32)
    best = tl.full([BM], -1, tl.int32)
    mass = tl.zeros([BM, FEATURES if FEATURES else 1], tl.float32)

    # columns of this block's first and last row
    first = r0 + off
    last = tl.minimum(r0 + BM, lq) - 1 + off
    lo, full0, full1, hi = reach(first, last, lk, window, BN, CAUSAL, WINDOW)
    if CAPPED and CAUSAL:
        # nearer keys are weighed by their distance, in the masked tiles
        full1 = tl.minimum(full1, tl.maximum(first - cap + 1, 0) // BN * BN)
    if KEPT and not CAUSAL:  # kept keys may stand on either side: every tile in between
        lo = tl.minimum(lo, tl.maximum(keep0, 0) // BN * BN)
        hi = tl.maximum(hi, tl.minimum(keep1, lk))
        full0 = lo
        full1 = lo
    begin = 0
    if KEEP:  # padding at the ends is not even visited
        begin = tl.load(ends_ptr + batch * 2) // BN * BN
        lo = tl.maximum(lo, begin)
        hi = tl.minimum(hi, tl.load(ends_ptr + batch * 2 + 1))
        full0 = tl.maximum(full0, lo)
        full1 = tl.minimum(full1, tl.maximum(hi, 0) // BN * BN)
    if LISTED:
        hi = tl.load(count_ptr + batch * (n_kv * GROUP) + head)
        lo = 0
        full0 = 0
        full1 = 0
    if KEPT and CAUSAL and not LISTED:
        acc, acc2, m, norm, e, far, near, best, mass = _tiles(
            acc, acc2, m, norm, e, far, near, best, mass,
            q, q2, temper, rows, row_ok, off, first,
            k_at, v_at, keep_at, dirty_at, bias_at, dense_at, feature_at, list_at,
            k_n, k_d, v_n, v_d, keep_n, bias_n, dense_n,
            tl.maximum(begin, tl.maximum(keep0, 0) // BN * BN),
            tl.minimum(tl.minimum(keep1, last + 1), lo), lk, window, keep0, keep1, cap, scale,
            softcap, sigmoid,
            BN, D, DP, DP2, DV, DVP, DVP2, True, CAUSAL, WINDOW, KEPT, KEEP, LISTED,
            DENSE, DENSE_HIDES, SOFTCAP, TEMPER, BIAS, HIDES, SIGMOID, ENTROPY, ARGMAX, DISTANCE,
            CAPPED, FEATURES, INTERP, PRECISION,
        )  # fmt: skip
    if WINDOW and not LISTED:
        acc, acc2, m, norm, e, far, near, best, mass = _tiles(
            acc, acc2, m, norm, e, far, near, best, mass,
            q, q2, temper, rows, row_ok, off, first,
            k_at, v_at, keep_at, dirty_at, bias_at, dense_at, feature_at, list_at,
            k_n, k_d, v_n, v_d, keep_n, bias_n, dense_n,
            lo, tl.minimum(full0, hi), lk, window, keep0, keep1, cap, scale, softcap,
            sigmoid,
            BN, D, DP, DP2, DV, DVP, DVP2, True, CAUSAL, WINDOW, KEPT, KEEP, LISTED,
            DENSE, DENSE_HIDES, SOFTCAP, TEMPER, BIAS, HIDES, SIGMOID, ENTROPY, ARGMAX, DISTANCE,
            CAPPED, FEATURES, INTERP, PRECISION,
        )  # fmt: skip
    if not LISTED:
        acc, acc2, m, norm, e, far, near, best, mass = _tiles(
            acc, acc2, m, norm, e, far, near, best, mass,
            q, q2, temper, rows, row_ok, off, first,
            k_at, v_at, keep_at, dirty_at, bias_at, dense_at, feature_at, list_at,
            k_n, k_d, v_n, v_d, keep_n, bias_n, dense_n,
            full0, full1, lk, window, keep0, keep1, cap, scale, softcap,
            sigmoid,
            BN, D, DP, DP2, DV, DVP, DVP2, False, CAUSAL, WINDOW, KEPT, KEEP, LISTED,
            DENSE, DENSE_HIDES, SOFTCAP, TEMPER, BIAS, HIDES, SIGMOID, ENTROPY, ARGMAX, DISTANCE,
            CAPPED, FEATURES, INTERP, PRECISION,
        )  # fmt: skip
    acc, acc2, m, norm, e, far, near, best, mass = _tiles(
        acc, acc2, m, norm, e, far, near, best, mass,
        q, q2, temper, rows, row_ok, off, first,
        k_at, v_at, keep_at, dirty_at, bias_at, dense_at, feature_at, list_at,
        k_n, k_d, v_n, v_d, keep_n, bias_n, dense_n,
        tl.maximum(full0, full1), hi, lk, window, keep0, keep1, cap, scale, softcap,
        sigmoid,
        BN, D, DP, DP2, DV, DVP, DVP2, True, CAUSAL, WINDOW, KEPT, KEEP, LISTED,
        DENSE, DENSE_HIDES, SOFTCAP, TEMPER, BIAS, HIDES, SIGMOID, ENTROPY, ARGMAX, DISTANCE,
        CAPPED, FEATURES, INTERP, PRECISION,
    )  # fmt: skip

    empty = norm <= 0.0
    safe = tl.where(empty, 1.0, norm)
    if SIGMOID:
        lse = tl.log2(safe)
        inverse = tl.where(empty, 0.0, 1.0)
    else:
        lse = m + tl.log2(safe)
        if SINK:  # the sink logit joins last: it takes its share and gives no value
            sink = tl.load(sink_ptr + head).to(tl.float32) * 1.4426950408889634
            high = tl.maximum(lse, sink)
            lse = high + tl.log2(tl.exp2(lse - high) + tl.exp2(sink - high))
        inverse = tl.where(empty, 0.0, tl.exp2(m - lse))
    flat = (batch * (n_kv * GROUP) + head) * lq + rows  # of a (batch, heads, queries) tensor
    tl.store(lse_ptr + flat, tl.where(empty, float("-inf"), lse * 0.6931471805599453), mask=row_ok)

    # statistics: 0 for rows that see nothing and for padding
    counted = norm != 0.0  # NaN stays
    if REAL:
        counted = counted & (tl.load(real_ptr + batch * real_b + rows, mask=row_ok, other=0) != 0)
    scaling = inverse
    inverse = tl.where(counted, inverse, 0.0)
    share = norm * inverse
    if ENTROPY:
        # −Σ A ln A with ln A = ln2·(t + m − lse)
        tl.store(
            entropy_ptr + flat, 0.6931471805599453 * (share * (lse - m) - e * inverse), mask=row_ok
        )
    if MAX:
        tl.store(max_ptr + flat, tl.minimum(inverse, share), mask=row_ok)
    if ARGMAX:
        tl.store(argmax_ptr + flat, tl.where(counted, best, -1).to(tl.int64), mask=row_ok)
    g = tl.arange(0, FEATURES if FEATURES else 1)
    if DISTANCE:
        if CAUSAL:
            far += tl.sum(tl.where(g[None, :] == FEATURES - 1, mass, 0.0), 1)
            mean = tl.arange(0, BM).to(tl.float32) * share - far * inverse
        else:
            mean = far * inverse
        tl.store(distance_ptr + flat, mean, mask=row_ok)
    if CAPPED:
        tl.store(capped_ptr + flat, cap * share - near * inverse, mask=row_ok)
    if GROUPS:
        tl.store(
            mass_ptr + flat[:, None] * GROUPS + g[None, :],
            mass * inverse[:, None],
            mask=row_ok[:, None] & (g[None, :] < GROUPS),
        )
    # last: its many addresses want the registers
    out_at = out_ptr + batch * o_b + head.to(tl.int64) * o_h + r0.to(tl.int64) * o_m
    out_at += tl.arange(0, BM)[:, None] * o_m
    _store(out_at, acc * scaling[:, None], row_ok, 0, DVP, DV)
    if DVP2:
        _store(out_at, acc2 * scaling[:, None], row_ok, DVP, DVP2, DV)
