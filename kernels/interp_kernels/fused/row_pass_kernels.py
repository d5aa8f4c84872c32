"""Two row-major kernels of weights that are known: statistics and block maxima in a pass of queries
and keys alone, and the strongest keys of each row from the blocks that can hold them.

With the log-sum-exp in hand a weight is

    A = exp(logit − lse)·f + u·[the row's own key]

f being what an edit's rules leave of the key's group in that row (times 1 − u), u what a blend
gives. Nothing is rescaled on the way, so every statistic is the sum, or the maximum, that its
definition says; factors of any sign do.

Keys are ranked by their weights, where no edit changes these by their logits, which do not
underflow; equal ones by the lower column. A key that no index may name ranks as HIDDEN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_kernels import _TAKEN, _index_of, _packed, _value_of
from .forward_kernel import weights_times
from .primitives import FLOOR, HIDDEN, dot, reach, seen, soft_cap, tile

_BIG = tl.constexpr(2147483647)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _weights(
    s, ok, own, lse, temper, bias, dense, label, factor_at, u, row_ok, scale, softcap,
    SOFTCAP: tl.constexpr, TEMPER: tl.constexpr, BIAS: tl.constexpr, HIDES: tl.constexpr,
    DENSE: tl.constexpr, DENSE_HIDES: tl.constexpr, GROUPS: tl.constexpr, BLEND: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """(weight, rank) of the keys (rows, keys) with products s; ok: seen by geometry and padding;
    what hangs on a row is (rows, 1), what hangs on a key (1, keys). DENSE: 1 for a mask of flags,
    2 for a bias; CUT: some key may not be seen."""
    s = s * scale
    if SOFTCAP:
        s = soft_cap(s, softcap)
    if TEMPER:
        s = s * temper
    if BIAS:
        s = s + tl.where(bias > HIDES, bias * _LOG2E, HIDDEN)
    if DENSE == 1:
        s = tl.where(dense != 0, s, HIDDEN)
    if DENSE == 2:
        s = s + tl.where(dense > DENSE_HIDES, dense * _LOG2E, HIDDEN)
    if CUT:
        s = tl.where(ok, s, HIDDEN)
    a = tl.exp2(s - lse)
    shown = s > FLOOR
    if GROUPS:
        factor = tl.load(factor_at, mask=row_ok, other=0.0)  # (rows, 1)
        for g in tl.static_range(1, GROUPS):
            other = tl.load(factor_at + g, mask=row_ok, other=0.0)
            factor = tl.where(label == g, other, factor)
        a = a * factor
    if BLEND:
        a = a + tl.where(own, u, 0.0)
        shown = shown | (a > 0.0)  # a key that a bias hides, and the blend gave weight
    rank = tl.where(shown, a if GROUPS else s, HIDDEN)
    return a, rank


@triton.jit
def _tiles(
    e, best, index, far, near, mass, q, q2, rows, row_ok, lse, temper, u,
    k_ptr, keys_ptr, bias_ptr, dense_ptr, label_ptr, factor_at, feature_ptr, tops_at,
    k_n, k_d, bias_n, dense_m, dense_n, label_n,
    lo, hi, lk, off, window, keep0, keep1, cap, scale, softcap, dense_rows, tops_m,
    BN: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DP2: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEPT: tl.constexpr,
    KEYS: tl.constexpr, SOFTCAP: tl.constexpr, TEMPER: tl.constexpr, BIAS: tl.constexpr,
    HIDES: tl.constexpr, DENSE: tl.constexpr, DENSE_HIDES: tl.constexpr, GROUPS: tl.constexpr,
    LABELS: tl.constexpr, BLEND: tl.constexpr, ENTROPY: tl.constexpr, LARGEST: tl.constexpr,
    DISTANCE: tl.constexpr, CAPPED: tl.constexpr, FEATURES: tl.constexpr, TOPS: tl.constexpr,
    INTERP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums after the keys lo … hi (lo a multiple of BN)."""
    offs_n = tl.arange(0, BN)
    for start in tl.range(lo, hi, BN):
        start = tl.multiple_of(start, BN)
        cols = start + offs_n
        inside = cols < lk
        k_from = k_ptr + start.to(tl.int64) * k_n
        k_at = offs_n[None, :] * k_n
        k = tile(k_from, k_at, k_d, inside, 0, DP, D, MASK, True)  # (DP, BN)
        s = dot(q, k, tl.zeros([q.shape[0], BN], tl.float32), INTERP, PRECISION)  # (BM, BN)
        if DP2:
            k2 = tile(k_from, k_at, k_d, inside, DP, DP2, D, MASK, True)
            s = dot(q2, k2, s, INTERP, PRECISION)
        ok = inside[None, :]
        if MASK:
            ok = seen(
                rows[:, None], cols[None, :], off, lk, window, keep0, keep1, CAUSAL, WINDOW, KEPT
            )
        if KEYS:
            ok = ok & (tl.load(keys_ptr + cols, mask=inside, other=0) != 0)[None, :]
        bias = 0.0
        if BIAS:
            # float32 first: in float16 HIDDEN is −inf
            bias = tl.load(bias_ptr + cols * bias_n, mask=inside, other=0.0).to(tl.float32)[None, :]
        dense = 0.0
        if DENSE:
            to = dense_ptr + dense_rows + cols[None, :].to(tl.int64) * dense_n
            dense = tl.load(to, mask=row_ok[:, None] & inside[None, :], other=0)
            if DENSE == 2:
                dense = dense.to(tl.float32)
        label = 0
        if LABELS:
            label = tl.load(label_ptr + cols * label_n, mask=inside, other=0).to(tl.int32)[None, :]
        own = rows[:, None] + off == cols[None, :]
        a, rank = _weights(
            s, ok, own, lse[:, None], temper[:, None], bias, dense, label, factor_at,
            u[:, None], row_ok[:, None], scale, softcap,
            SOFTCAP, TEMPER, BIAS, HIDES, DENSE, DENSE_HIDES, GROUPS, BLEND,
            MASK or KEYS,
        )  # fmt: skip
        if ENTROPY:
            # a weight below 0 has no logarithm: −∞, as torch.special.entr says; NaN stays NaN
            log = a * tl.log2(tl.where(a > 0.0, a, 1.0))
            e += tl.sum(tl.where(a < 0.0, float("inf"), log), 1)
        if LARGEST:
            top = tl.max(rank, 1)
            better = top > best  # an earlier tile keeps equal ones
            if tl.max(better.to(tl.int32), 0) != 0:
                column = tl.min(tl.where(rank == top[:, None], cols[None, :], _BIG), 1)
                index = tl.where(better, column, index)
                best = tl.maximum(best, top)
        if DISTANCE or CAPPED:
            ahead = (rows + off).to(tl.float32)[:, None] - cols.to(tl.float32)[None, :]
            if DISTANCE:
                far += tl.sum(a * tl.abs(ahead), 1)
            if CAPPED:
                near += tl.sum(a * tl.minimum(tl.abs(ahead), cap.to(tl.float32)), 1)
        if FEATURES:
            f_at = feature_ptr + start.to(tl.int64) * FEATURES
            f_at += offs_n[:, None] * FEATURES + tl.arange(0, FEATURES)[None, :]
            features = tl.load(f_at, mask=inside[:, None], other=0.0)  # (BN, F)
            mass = weights_times(a, features, mass, INTERP, PRECISION)
        if TOPS:
            parts = tl.reshape(rank, [rank.shape[0], BN // BLOCK, BLOCK])
            block = start // BLOCK + tl.arange(0, BN // BLOCK)
            tl.store(
                tops_at[:, None] + block[None, :],
                tl.max(parts, 2),
                mask=row_ok[:, None] & (block < tops_m)[None, :],
            )
    return e, best, index, far, near, mass


@triton.jit
def row_kernel(
    q_ptr, k_ptr, lse_ptr, keys_ptr, real_ptr, temper_ptr, bias_ptr, dense_ptr, label_ptr,
    factor_ptr, blend_ptr, feature_ptr, start_ptr,
    entropy_ptr, max_ptr, index_ptr, distance_ptr, capped_ptr, mass_ptr, tops_ptr,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, real_b, temper_b, temper_h, temper_m,
    bias_b, bias_h, bias_n, dense_b, dense_h, dense_m, dense_n, label_b, label_h, label_n,
    blend_b, blend_h, blend_m,
    lq, lk, off, window, keep_first, cap, scale, softcap, n_kv, row0, row1, tops_m,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DP2: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, KEPT: tl.constexpr, KEYS: tl.constexpr, REAL: tl.constexpr,
    SOFTCAP: tl.constexpr, TEMPER: tl.constexpr, BIAS: tl.constexpr, HIDES: tl.constexpr,
    DENSE: tl.constexpr, DENSE_HIDES: tl.constexpr, GROUPS: tl.constexpr, LABELS: tl.constexpr,
    BLEND: tl.constexpr, ENTROPY: tl.constexpr, MAX: tl.constexpr, ARGMAX: tl.constexpr,
    DISTANCE: tl.constexpr, CAPPED: tl.constexpr, MASSES: tl.constexpr, FEATURES: tl.constexpr,
    TOPS: tl.constexpr, INTERP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program is BM of the rows row0 … row1 of one head.

    q (batch, heads, lq, D), k (batch, heads / GROUP, lk, D), lse (batch, heads, lq) in base 2, a
    huge number where a row sees nothing; factors (batch, heads, lq, GROUPS); tops (batch, heads,
    row1 − row0, tops_m), the largest rank of each BLOCK keys. scale and softcap in base 2."""
    pid = tl.program_id(0)
    n_m = tl.cdiv(row1 - row0, BM)
    member = pid % GROUP
    block = n_m - 1 - (pid // GROUP) % n_m
    kv = (pid // (GROUP * n_m)) % n_kv
    batch = (pid // (GROUP * n_m * n_kv)).to(tl.int64)
    head = kv * GROUP + member

    r0 = row0 + block * BM
    rows = r0 + tl.arange(0, BM)  # (BM,)
    row_ok = rows < row1
    q_from = q_ptr + batch * q_b + head.to(tl.int64) * q_h + r0.to(tl.int64) * q_m
    q_at = tl.arange(0, BM)[:, None] * q_m
    q = tile(q_from, q_at, q_d, row_ok, 0, DP, D, True, False)  # (BM, DP)
    q2 = row_ok
    if DP2:
        q2 = tile(q_from, q_at, q_d, row_ok, DP, DP2, D, True, False)  # (BM, DP2)
    flat = (batch * (n_kv * GROUP) + head) * lq + rows  # of a (batch, heads, queries) tensor
    lse = tl.load(lse_ptr + flat, mask=row_ok, other=0.0)
    temper = lse
    if TEMPER:
        to = temper_ptr + batch * temper_b + head * temper_h + rows * temper_m
        temper = tl.load(to, mask=row_ok, other=0.0).to(tl.float32)
    u = lse
    if BLEND:
        to = blend_ptr + batch * blend_b + head * blend_h + rows * blend_m
        u = tl.load(to, mask=row_ok, other=0.0)
    keep0 = 0
    keep1 = 0
    if KEPT:
        keep0 = tl.load(start_ptr + batch)
        keep1 = keep0 + keep_first
    k_at = k_ptr + batch * k_b + kv.to(tl.int64) * k_h
    keys_at = keys_ptr + batch * lk
    bias_at = bias_ptr + batch * bias_b + head.to(tl.int64) * bias_h
    dense_at = dense_ptr + batch * dense_b + head.to(tl.int64) * dense_h
    dense_rows = rows.to(tl.int64)[:, None] * dense_m
    label_at = label_ptr + batch * label_b + head.to(tl.int64) * label_h
    factor_at = factor_ptr + (flat * GROUPS)[:, None]
    feature_at = feature_ptr + batch * lk * FEATURES
    line = (batch * (n_kv * GROUP) + head) * (row1 - row0) + rows - row0
    tops_at = tops_ptr + line * tops_m

    LARGEST: tl.constexpr = MAX or ARGMAX
    e = tl.zeros([BM], tl.float32)
    best = tl.full([BM], FLOOR, tl.float32)
    index = tl.full([BM], -1, tl.int32)
    far = tl.zeros([BM], tl.float32)
    near = tl.zeros([BM], tl.float32)
    mass = tl.zeros([BM, FEATURES if FEATURES else 1], tl.float32)

    first = r0 + off
    last = tl.minimum(r0 + BM, row1) - 1 + off
    lo, full0, full1, hi = reach(first, last, lk, window, BN, CAUSAL, WINDOW)
    if KEPT and not CAUSAL:  # kept keys may stand on either side: every tile in between
        lo = tl.minimum(lo, tl.maximum(keep0, 0) // BN * BN)
        hi = tl.maximum(hi, tl.minimum(keep1, lk))
        full0 = lo
        full1 = lo
    if KEPT and CAUSAL:
        e, best, index, far, near, mass = _tiles(
            e, best, index, far, near, mass, q, q2, rows, row_ok, lse, temper, u,
            k_at, keys_at, bias_at, dense_at, label_at, factor_at, feature_at, tops_at,
            k_n, k_d, bias_n, dense_m, dense_n, label_n,
            tl.maximum(keep0, 0) // BN * BN, tl.minimum(tl.minimum(keep1, last + 1), lo), lk, off,
            window, keep0, keep1, cap, scale, softcap, dense_rows, tops_m,
            BN, BLOCK, D, DP, DP2, True, CAUSAL, WINDOW, KEPT, KEYS, SOFTCAP, TEMPER, BIAS, HIDES,
            DENSE, DENSE_HIDES, GROUPS, LABELS, BLEND, ENTROPY, LARGEST, DISTANCE, CAPPED,
            FEATURES, TOPS, INTERP, PRECISION,
        )  # fmt: skip
    if WINDOW:
        e, best, index, far, near, mass = _tiles(
            e, best, index, far, near, mass, q, q2, rows, row_ok, lse, temper, u,
            k_at, keys_at, bias_at, dense_at, label_at, factor_at, feature_at, tops_at,
            k_n, k_d, bias_n, dense_m, dense_n, label_n, lo, tl.minimum(full0, hi), lk, off,
            window, keep0, keep1, cap, scale, softcap, dense_rows, tops_m,
            BN, BLOCK, D, DP, DP2, True, CAUSAL, WINDOW, KEPT, KEYS, SOFTCAP, TEMPER, BIAS, HIDES,
            DENSE, DENSE_HIDES, GROUPS, LABELS, BLEND, ENTROPY, LARGEST, DISTANCE, CAPPED,
            FEATURES, TOPS, INTERP, PRECISION,
        )  # fmt: skip
    e, best, index, far, near, mass = _tiles(
        e, best, index, far, near, mass, q, q2, rows, row_ok, lse, temper, u,
        k_at, keys_at, bias_at, dense_at, label_at, factor_at, feature_at, tops_at,
        k_n, k_d, bias_n, dense_m, dense_n, label_n, full0, full1, lk, off,
        window, keep0, keep1, cap, scale, softcap, dense_rows, tops_m,
        BN, BLOCK, D, DP, DP2, False, CAUSAL, WINDOW, KEPT, KEYS, SOFTCAP, TEMPER, BIAS, HIDES,
        DENSE, DENSE_HIDES, GROUPS, LABELS, BLEND, ENTROPY, LARGEST, DISTANCE, CAPPED,
        FEATURES, TOPS, INTERP, PRECISION,
    )  # fmt: skip
    e, best, index, far, near, mass = _tiles(
        e, best, index, far, near, mass, q, q2, rows, row_ok, lse, temper, u,
        k_at, keys_at, bias_at, dense_at, label_at, factor_at, feature_at, tops_at,
        k_n, k_d, bias_n, dense_m, dense_n, label_n, tl.maximum(full0, full1), hi, lk, off,
        window, keep0, keep1, cap, scale, softcap, dense_rows, tops_m,
        BN, BLOCK, D, DP, DP2, True, CAUSAL, WINDOW, KEPT, KEYS, SOFTCAP, TEMPER, BIAS, HIDES,
        DENSE, DENSE_HIDES, GROUPS, LABELS, BLEND, ENTROPY, LARGEST, DISTANCE, CAPPED,
        FEATURES, TOPS, INTERP, PRECISION,
    )  # fmt: skip

    counted = row_ok
    if REAL:
        real = tl.load(real_ptr + batch * real_b + rows, mask=row_ok, other=0)
        counted = counted & (real != 0)
    if ENTROPY:
        tl.store(entropy_ptr + flat, tl.where(counted, -_LN2 * e, 0.0), mask=row_ok)
    if MAX:  # what a maximum passes over, NaN, the row's log-sum-exp has
        largest = tl.where(lse == lse, tl.maximum(best, 0.0), lse)
        tl.store(max_ptr + flat, tl.where(counted, largest, 0.0), mask=row_ok)
    if ARGMAX:
        tl.store(index_ptr + flat, tl.where(counted, index, -1).to(tl.int64), mask=row_ok)
    if DISTANCE:
        tl.store(distance_ptr + flat, tl.where(counted, far, 0.0), mask=row_ok)
    if CAPPED:
        tl.store(capped_ptr + flat, tl.where(counted, near, 0.0), mask=row_ok)
    if MASSES:
        g = tl.arange(0, FEATURES)
        tl.store(
            mass_ptr + flat[:, None] * MASSES + g[None, :],
            tl.where(counted[:, None], mass, 0.0),
            mask=row_ok[:, None] & (g < MASSES)[None, :],
        )


@triton.jit
def top_kernel(
    q_ptr, k_ptr, lse_ptr, keys_ptr, real_ptr, temper_ptr, bias_ptr, dense_ptr, label_ptr,
    factor_ptr, blend_ptr, start_ptr, tops_ptr, index_ptr, prob_ptr,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, real_b, temper_b, temper_h, temper_m,
    bias_b, bias_h, bias_n, dense_b, dense_h, dense_m, dense_n, label_b, label_h, label_n,
    blend_b, blend_h, blend_m,
    lq, lk, off, window, keep_first, scale, softcap, row0, row1, tops_m,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DP2: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEPT: tl.constexpr, KEYS: tl.constexpr,
    REAL: tl.constexpr, SOFTCAP: tl.constexpr, TEMPER: tl.constexpr, BIAS: tl.constexpr,
    HIDES: tl.constexpr, DENSE: tl.constexpr, DENSE_HIDES: tl.constexpr, GROUPS: tl.constexpr,
    LABELS: tl.constexpr, BLEND: tl.constexpr,
):  # fmt: skip
    """Columns and weights of a row's K strongest keys, which lie in the K blocks with the largest
    maxima: only these are read again. A program is one row of one head; index and prob (batch,
    heads, lq, K)."""
    pid = tl.program_id(0)
    n = row1 - row0
    row = row0 + pid % n
    head = (pid // n) % HEADS
    batch = (pid // (n * HEADS)).to(tl.int64)
    flat = (batch * HEADS + head) * lq + row
    lse = tl.load(lse_ptr + flat)
    real = lse == lse
    if REAL:
        real = real & (tl.load(real_ptr + batch * real_b + row) != 0)

    ranks = tl.arange(0, KP)
    t = tl.arange(0, TILES)
    line = (batch * HEADS + head) * n + row - row0
    top = _packed(
        tl.load(tops_ptr + line * tops_m + t, mask=t < tops_m, other=float("-inf")), t
    )  # (TILES,)
    q_at = q_ptr + batch * q_b + head.to(tl.int64) * q_h + row.to(tl.int64) * q_m
    k_from = k_ptr + batch * k_b + (head // GROUP).to(tl.int64) * k_h
    one = tl.zeros([1], tl.int32)
    always = one == 0
    q = tile(q_at, one.to(tl.int64)[:, None], q_d, always, 0, DP, D, False, False)  # (1, DP)
    if DP2:
        q2 = tile(q_at, one.to(tl.int64)[:, None], q_d, always, DP, DP2, D, False, False)
    temper = 1.0
    if TEMPER:
        temper = tl.load(temper_ptr + batch * temper_b + head * temper_h + row * temper_m)
        temper = temper.to(tl.float32)
    u = 0.0
    if BLEND:
        u = tl.load(blend_ptr + batch * blend_b + head * blend_h + row * blend_m)
    keep0 = 0
    keep1 = 0
    if KEPT:
        keep0 = tl.load(start_ptr + batch)
        keep1 = keep0 + keep_first
    offs = tl.arange(0, BLOCK)
    left = tl.full([KP, BLOCK], _TAKEN, tl.int64)
    for rank in range(K):
        best = tl.max(top, 0)
        top = tl.where(top == best, _TAKEN, top)
        # a block that nothing is left of stands before the keys: the interpreter cannot spread a
        # scalar truth value over a vector
        cols = tl.where(_value_of(best) > FLOOR, _index_of(best), -1) * BLOCK + offs  # (BLOCK,)
        inside = (cols >= 0) & (cols < lk)
        k_at = cols.to(tl.int64)[:, None] * k_n
        k = tile(k_from, k_at, k_d, inside, 0, DP, D, True, False)  # (BLOCK, DP)
        s = tl.sum(k.to(tl.float32) * q.to(tl.float32), 1)
        if DP2:
            k2 = tile(k_from, k_at, k_d, inside, DP, DP2, D, True, False)
            s += tl.sum(k2.to(tl.float32) * q2.to(tl.float32), 1)
        ok = inside & seen(row, cols, off, lk, window, keep0, keep1, CAUSAL, WINDOW, KEPT)
        if KEYS:
            ok = ok & (tl.load(keys_ptr + batch * lk + cols, mask=inside, other=0) != 0)
        bias = 0.0
        if BIAS:
            to = bias_ptr + batch * bias_b + head.to(tl.int64) * bias_h + cols * bias_n
            bias = tl.load(to, mask=inside, other=0.0).to(tl.float32)
        dense = 0.0
        if DENSE:
            to = dense_ptr + batch * dense_b + head.to(tl.int64) * dense_h
            to += row.to(tl.int64) * dense_m
            dense = tl.load(to + cols.to(tl.int64) * dense_n, mask=inside, other=0)
            if DENSE == 2:
                dense = dense.to(tl.float32)
        label = 0
        if LABELS:
            to = label_ptr + batch * label_b + head.to(tl.int64) * label_h + cols * label_n
            label = tl.load(to, mask=inside, other=0).to(tl.int32)
        _, value = _weights(
            s, ok, row + off == cols, lse, temper, bias, dense, label,
            factor_ptr + flat * GROUPS + cols * 0, u, inside, scale, softcap,
            SOFTCAP, TEMPER, BIAS, HIDES, DENSE, DENSE_HIDES, GROUPS, BLEND, True,
        )  # fmt: skip
        mine = (ranks == rank)[:, None]
        left = tl.where(mine, tl.where(ok, _packed(value, cols), _TAKEN)[None, :], left)

    index = tl.full([KP], -1, tl.int32)
    prob = tl.zeros([KP], tl.float32)
    for rank in range(K):
        best = tl.max(tl.max(left, 1), 0)
        value = _value_of(best)  # NaN once everything is taken
        hit = (value > FLOOR) & real
        if GROUPS:
            hit = hit & (value >= 0.0)
            weight = value
        else:
            weight = tl.exp2(tl.where(hit, value, 0.0) - lse)
        index = tl.where(ranks == rank, tl.where(hit, _index_of(best), -1), index)
        prob = tl.where(ranks == rank, tl.where(hit, weight, 0.0), prob)
        left = tl.where(left == best, _TAKEN, left)
    prob = tl.where(lse == lse, prob, lse)
    tl.store(index_ptr + flat * K + ranks, index.to(tl.int64), mask=ranks < K)
    tl.store(prob_ptr + flat * K + ranks, prob, mask=ranks < K)
