"""The two kernels of decode: partial softmax states of pieces of the keys, and their combination
under a rule.

Grouped attention states: with a rule over G groups the query rows stand in the tile G times,
replica g seeing only the keys labelled g. One product per tile then serves all groups, and keys and
values are read once; the rows added would be padding of the tile anyway (a dot takes at least 16).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import FLOOR, HIDDEN, NOTHING, dot, seen, soft_cap, tile

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
#: Below every packed score: what was taken already.
_TAKEN = tl.constexpr(-0x7FFFFFFFFFFFFFFF)

#: Integers that change from one step to the next: no new variant of the kernel for their being 1 or
#: divisible by 16.
_STEPPING = [
    "keys_b",
    "bias_b",
    "bias_h",
    "bias_n",
    "label_b",
    "label_h",
    "label_n",
    "temper_b",
    "temper_h",
    "temper_m",
    "dense_b",
    "dense_h",
    "dense_m",
    "dense_n",
    "keep_first",
    "n_pages",
    "lq",
    "rows",
    "lk",
    "hi",
    "first",
    "tiles",
    "per_split",
    "n_splits",
    "off",
    "window",
    "a0",
    "b0",
    "g0",
    "a1",
    "b1",
    "g1",
    "a2",
    "b2",
    "g2",
    "a3",
    "b3",
    "g3",
]


@triton.jit
def _in_span(label, cols, start, stop, group):
    return tl.where((cols >= start) & (cols < stop), group, label)


@triton.jit
def _store(to, value, row_ok, FROM: tl.constexpr, SIZE: tl.constexpr, DV: tl.constexpr):
    dims = FROM + tl.arange(0, SIZE)[None, :]
    tl.store(to + dims, value, mask=row_ok[:, None] & (dims < DV))


@triton.jit(do_not_specialize=_STEPPING)
def split_kernel(
    q_ptr, k_ptr, v_ptr, pages_ptr, keys_ptr, bias_ptr, label_ptr, temper_ptr, stand_ptr,
    dense_ptr, start_ptr,
    m_ptr, l_ptr, acc_ptr, score_ptr, top_ptr,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    keys_b, bias_b, bias_h, bias_n, label_b, label_h, label_n, temper_b, temper_h, temper_m,
    dense_b, dense_h, dense_m, dense_n,
    n_pages, lq, rows, lk, hi, first, tiles, per_split, n_splits, off, window, keep_first, scale,
    cap,
    a0, b0, g0, a1, b1, g1, a2, b2, g2, a3, b3, g3,
    KV: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DP2: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    DVP2: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    KEPT: tl.constexpr, DENSE: tl.constexpr, DENSE_HIDES: tl.constexpr,
    KEYS: tl.constexpr, SOFTCAP: tl.constexpr, TEMPER: tl.constexpr,
    BIAS: tl.constexpr, HIDES: tl.constexpr, BIAS_HEADS: tl.constexpr, LABELS: tl.constexpr,
    LABEL_HEADS: tl.constexpr, SPANS: tl.constexpr, SCORES: tl.constexpr, STANDS: tl.constexpr,
    INTERP: tl.constexpr, PRECISION: tl.constexpr, V_PRECISION: tl.constexpr,
):  # fmt: skip
    """m, l, acc (batch, heads, queries, groups, splits[, d_v]) of one piece of the keys for all
    heads of a kv head:

        s = temper·softcap(scale·q·k) + bias,  m = max s,  den = Σ 2^(s − m),  acc = Σ 2^(s − m)·v
        (base 2)

    each sum over the keys of the row's group; and where asked the natural-log scores (batch, heads,
    queries, lk) and their maximum a tile (batch, heads, queries, tiles). Tile t of the call has the
    columns (first + t)·BN ….
    """
    split = tl.program_id(0)
    batch = (tl.program_id(1) // KV).to(tl.int64)
    kv = tl.program_id(1) % KV

    r = tl.program_id(2) * BM + tl.arange(
        0, BM
    )  # (BM,) replica-major: group, then query head, then query
    group = r // rows
    base = r % rows
    row_ok = r < rows * GROUPS
    head = kv * GROUP + base // lq
    query = base % lq
    flat = (batch * (KV * GROUP) + head) * lq + query  # of (batch, heads, queries), int64
    offs_n = tl.arange(0, BN)
    q_from = q_ptr + batch * q_b
    q_at = head[:, None].to(tl.int64) * q_h + query[:, None] * q_m
    q = tile(q_from, q_at, q_d, row_ok, 0, DP, D, True, False)  # (BM, DP)
    q2 = row_ok
    if DP2:
        q2 = tile(q_from, q_at, q_d, row_ok, DP, DP2, D, True, False)
    temper = tl.full([BM], 1.0, tl.float32)
    if TEMPER:
        temper = tl.load(
            temper_ptr + batch * temper_b + head * temper_h + query * temper_m,
            mask=row_ok,
            other=1.0,
        ).to(tl.float32)

    stand = query + off  # the column each row stands at
    if STANDS:
        stand = tl.load(stand_ptr + query, mask=row_ok, other=0)

    keep0 = 0
    keep1 = 0
    if KEPT:
        keep0 = tl.load(start_ptr + batch)
        keep1 = keep0 + keep_first
    k_at = k_ptr + kv.to(tl.int64) * k_h
    v_at = v_ptr + kv.to(tl.int64) * v_h
    if PAGE == 0:
        k_at += batch * k_b
        v_at += batch * v_b

    m = tl.full([BM], FLOOR, tl.float32)
    den = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DVP], tl.float32)
    acc2 = tl.zeros([BM, DVP2 if DVP2 else 1], tl.float32)
    t0 = split * per_split
    for t in tl.range(t0, tl.minimum(t0 + per_split, tiles)):
        start = (first + t) * BN
        cols = start + offs_n  # (BN,)
        inside = cols < hi
        if KEYS:
            inside = inside & (tl.load(keys_ptr + batch * keys_b + cols, mask=inside, other=0) != 0)
        # whatever is not seen is not even read where that is known for a column: unused pages may
        # hold anything
        if PAGE > 0:
            page = tl.load(pages_ptr + batch * n_pages + cols // PAGE, mask=inside, other=0).to(
                tl.int64
            )
            k_from = k_at
            v_from = v_at
            k_to = (page * k_b + cols % PAGE * k_n)[None, :]
            v_to = (page * v_b + cols % PAGE * v_n)[:, None]
        else:
            k_from = k_at + start.to(tl.int64) * k_n
            v_from = v_at + start.to(tl.int64) * v_n
            k_to = (offs_n * k_n)[None, :]
            v_to = (offs_n * v_n)[:, None]
        readable = inside if PAGE > 0 else cols < hi
        k = tile(k_from, k_to, k_d, readable, 0, DP, D, True, True)  # (DP, BN)
        v = tile(v_from, v_to, v_d, readable, 0, DVP, DV, True, False)  # (BN, DVP)
        s = dot(q, k, tl.zeros([BM, BN], tl.float32), INTERP, PRECISION)  # (BM, BN)
        if DP2:
            k2 = tile(k_from, k_to, k_d, readable, DP, DP2, D, True, True)
            s = dot(q2, k2, s, INTERP, PRECISION)
        s = s * scale
        if SOFTCAP:
            s = soft_cap(s, cap)
        if TEMPER:
            s = s * temper[:, None]
        if BIAS:
            if BIAS_HEADS:
                bias = tl.load(
                    bias_ptr
                    + batch * bias_b
                    + head[:, None].to(tl.int64) * bias_h
                    + cols[None, :] * bias_n,
                    mask=row_ok[:, None] & inside[None, :],
                    other=0.0,
                ).to(tl.float32)  # (BM, BN)
            else:
                bias = tl.load(
                    bias_ptr + batch * bias_b + cols * bias_n, mask=inside, other=0.0
                ).to(tl.float32)[None]
            s = s + tl.where(
                bias > HIDES, bias * _LOG2E, HIDDEN
            )  # as masking.bias_visible; −inf would give NaN
        if DENSE:
            to = dense_ptr + batch * dense_b + head[:, None].to(tl.int64) * dense_h
            to += query[:, None].to(tl.int64) * dense_m + cols[None, :].to(tl.int64) * dense_n
            dense = tl.load(to, mask=row_ok[:, None] & inside[None, :], other=0)  # (BM, BN)
            if DENSE == 1:
                s = tl.where(dense != 0, s, HIDDEN)
            else:
                dense = dense.to(tl.float32)
                s = s + tl.where(dense > DENSE_HIDES, dense * _LOG2E, HIDDEN)
        ok = inside[None, :] & seen(
            stand[:, None], cols[None, :], 0, hi, window, keep0, keep1, CAUSAL, WINDOW, KEPT
        )
        s = tl.where(ok, s, HIDDEN)
        # before the groups part; tile maxima of what is stored, so that they agree to the last bit
        if SCORES:
            raw = tl.where(s > FLOOR, s * _LN2, float("-inf"))
            once = row_ok & (group == 0)
            tl.store(
                score_ptr + flat[:, None] * lk + cols[None, :],
                raw,
                mask=once[:, None] & (cols < hi)[None, :],
            )
            tl.store(top_ptr + flat * tiles + t, tl.max(raw, 1), mask=once)
        if GROUPS > 1:
            if LABELS and LABEL_HEADS:
                label = tl.load(
                    label_ptr
                    + batch * label_b
                    + head[:, None].to(tl.int64) * label_h
                    + cols[None, :] * label_n,
                    mask=row_ok[:, None] & inside[None, :],
                    other=-1,
                ).to(tl.int32)  # (BM, BN)
            elif LABELS:
                label = tl.load(
                    label_ptr + batch * label_b + cols * label_n, mask=inside, other=-1
                ).to(tl.int32)[None]
            else:
                at = tl.zeros([BN], tl.int32)
                if SPANS > 0:
                    at = _in_span(at, cols, a0, b0, g0)
                if SPANS > 1:
                    at = _in_span(at, cols, a1, b1, g1)
                if SPANS > 2:
                    at = _in_span(at, cols, a2, b2, g2)
                if SPANS > 3:
                    at = _in_span(at, cols, a3, b3, g3)
                label = at[None, :]
            s = tl.where(label == group[:, None], s, HIDDEN)

        new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - new)
        p = tl.exp2(s - new[:, None])
        den = den * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if not INTERP:
            p = p.to(v.dtype)
        acc = dot(p, v, acc, INTERP, V_PRECISION)
        if DVP2:
            v2 = tile(v_from, v_to, v_d, readable, DVP, DVP2, DV, True, False)
            acc2 = dot(p, v2, acc2 * alpha[:, None], INTERP, V_PRECISION)
        m = new

    to = (flat * GROUPS + group) * n_splits + split  # (BM,)
    tl.store(m_ptr + to, m, mask=row_ok)
    tl.store(l_ptr + to, den, mask=row_ok)
    _store(acc_ptr + to[:, None] * DV, acc, row_ok, 0, DVP, DV)
    if DVP2:
        _store(acc_ptr + to[:, None] * DV, acc2, row_ok, DVP, DVP2, DV)


@triton.jit
def _packed(value, index):
    """One int64 that orders by value, then by the lower index: the float's bits made monotone,
    above ~index."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(
        tl.int64
    )


@triton.jit
def _value_of(packed):
    bits = (packed >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index_of(packed):
    return 0x7FFFFFFF - (packed & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _top_keys(
    row, lse, real, score_ptr, top_ptr, index_ptr, prob_ptr, lk, hi, first, tiles,
    K: tl.constexpr, KP: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The K largest scores lie in the K tiles with the largest maxima: only these are read."""
    ranks = tl.arange(0, KP)
    t = tl.arange(0, TILES)
    top = _packed(
        tl.load(top_ptr + row * tiles + t, mask=t < tiles, other=float("-inf")), t
    )  # (TILES,)
    chosen = tl.full([KP], -1, tl.int32)
    for rank in range(K):
        best = tl.max(top, 0)
        # scalars are chosen among scalars: the interpreter cannot spread a scalar truth value over
        # a vector
        chosen = tl.where(
            ranks == rank, tl.where(_value_of(best) > FLOOR, _index_of(best), -1), chosen
        )
        top = tl.where(top == best, _TAKEN, top)
    cols = (first + tl.maximum(chosen, 0)[:, None]) * BN + tl.arange(0, BN)[None, :]  # (KP, BN)
    score = tl.load(
        score_ptr + row * lk + cols, mask=(chosen[:, None] >= 0) & (cols < hi), other=float("-inf")
    )
    left = tl.reshape(_packed(score, cols), (KP * BN,))
    index = tl.full([KP], -1, tl.int32)
    prob = tl.zeros([KP], tl.float32)
    base = tl.where(real, lse, 0.0)
    for rank in range(K):
        best = tl.max(left, 0)
        value = _value_of(best)  # NaN once everything is taken
        hit = (value > FLOOR) & real
        index = tl.where(ranks == rank, tl.where(hit, _index_of(best), -1), index)
        prob = tl.where(
            ranks == rank,
            tl.where(hit, tl.exp2((tl.where(hit, value, 0.0) - base) * _LOG2E), 0.0),
            prob,
        )
        left = tl.where(left == best, _TAKEN, left)
    tl.store(index_ptr + row * K + ranks, index.to(tl.int64), mask=ranks < K)
    tl.store(prob_ptr + row * K + ranks, prob, mask=ranks < K)


@triton.jit(
    do_not_specialize=[
        "n_splits",
        "lq",
        "lk",
        "hi",
        "first",
        "tiles",
        "off",
        "n_pages",
        "gain_b",
        "gain_h",
        "gain_m",
    ]
)
def combine_kernel(
    m_ptr, l_ptr, acc_ptr, score_ptr, top_ptr, v_ptr, pages_ptr, keys_ptr, sink_ptr, real_ptr,
    keep_ptr, receive_ptr, tests_ptr, bounds_ptr, where_ptr, blend_ptr, gain_ptr,
    out_ptr, lse_ptr, mass_ptr, factor_ptr, index_ptr, prob_ptr,
    v_b, v_h, v_n, v_d, o_b, o_h, o_m, keep_h, receive_h, blend_h, gain_b, gain_h, gain_m,
    n_splits, lq, lk, hi, first, tiles, off, n_pages,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, GP: tl.constexpr, SP:
    tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, DT: tl.constexpr, PAGE: tl.constexpr, BS: tl.constexpr,
    SINK: tl.constexpr, KEYS: tl.constexpr, REAL: tl.constexpr, RULE: tl.constexpr, RECEIVE:
    tl.constexpr,
    RENORMALISE: tl.constexpr, TESTS: tl.constexpr, WHERE: tl.constexpr, BLEND: tl.constexpr, GAIN:
    tl.constexpr,
    FACTORS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = gain·((1 − u)·Σ_g factor_g·P_g·ô_g + u·v_own) of one row, lse, the masses P_g, with
    FACTORS those factors, and the strongest keys.

    Program 0, 1 … of the second axis writes DT dimensions of the output; one after the last finds
    the strongest keys.
    """
    row = tl.program_id(0).to(tl.int64)  # of (batch, heads, queries)
    part = tl.program_id(1)
    query = (row % lq).to(tl.int32)
    head = (row // lq % HEADS).to(tl.int32)
    batch = row // lq // HEADS

    g = tl.arange(0, GP)
    at = tl.arange(0, SP)
    there = (g < GROUPS)[:, None] & (at < n_splits)[None, :]
    state = (row * GROUPS + g[:, None]) * n_splits + at[None, :]  # (GP, SP)
    m = tl.load(m_ptr + state, mask=there, other=FLOOR)
    den = tl.load(l_ptr + state, mask=there, other=0.0)
    top = tl.max(tl.max(m, 1), 0)
    sink = 0.0
    if SINK:
        logit = tl.load(sink_ptr + head).to(tl.float32) * _LOG2E
        top = tl.maximum(top, logit)
        sink = tl.exp2(logit - top)
    mass = tl.sum(den * tl.exp2(m - top), 1)  # (GP,)
    total = tl.sum(mass, 0) + sink
    anything = tl.max(tl.max(den, 1), 0) > 0.0
    total = tl.where(
        anything, total, 1.0
    )  # which is at least 1 otherwise: the largest of all has weight 2⁰
    inverse = tl.where(anything, 1.0 / total, 0.0)
    lse = tl.where(anything, (top + tl.log2(total)) * _LN2, float("-inf"))
    mass = mass * inverse

    if part == DVP // DT:
        real = anything
        if REAL:
            real = anything & (tl.load(real_ptr + batch * lq + query) != 0)
        if K > 0:
            _top_keys(
                row,
                lse,
                real,
                score_ptr,
                top_ptr,
                index_ptr,
                prob_ptr,
                lk,
                hi,
                first,
                tiles,
                K,
                KP,
                TILES,
                BN,
            )
    else:
        factor = tl.full([GP], 1.0, tl.float32)  # as steer.factors
        if RULE:
            keep = tl.load(keep_ptr + head * keep_h + g, mask=g < GROUPS, other=0.0).to(tl.float32)
            if RENORMALISE:
                if RECEIVE:
                    least = tl.load(receive_ptr + head * receive_h + g, mask=g < GROUPS, other=0.0)
                    least = least.to(tl.float32) / tl.where(mass > NOTHING, mass, 1.0)
                    keep = tl.where(mass > NOTHING, tl.maximum(keep, least), keep)
                rest = tl.sum(keep * mass, 0) + sink * inverse
                factor = tl.where(rest > 0.0, keep / tl.where(rest > 0.0, rest, 1.0), 0.0)
            elif RECEIVE:
                receive = tl.load(
                    receive_ptr + head * receive_h + g, mask=g < GROUPS, other=0.0
                ).to(tl.float32)
                shared = tl.sum(receive * mass, 0)
                freed = tl.sum((1.0 - keep) * mass, 0)
                moved = keep + receive * freed / tl.where(shared > NOTHING, shared, 1.0)
                drops = tl.max((receive != 0.0).to(tl.int32), 0) == 0
                factor = tl.where((shared > NOTHING) | drops, moved, 1.0)
            else:
                factor = keep
            applies = anything
            for i in tl.static_range(TESTS):
                weight = tl.load(tests_ptr + i * GROUPS + g, mask=g < GROUPS, other=0.0).to(
                    tl.float32
                )
                applies = applies & (
                    tl.sum(weight * mass, 0) >= tl.load(bounds_ptr + i).to(tl.float32)
                )
            if WHERE:
                applies = applies & (tl.load(where_ptr + batch * lq + query) != 0)
            factor = tl.where(applies, factor, 1.0)

        offs = part * DT + tl.arange(0, DT)  # (DT,)
        out = tl.zeros([DT], tl.float32)
        for start in tl.range(0, GROUPS * n_splits, BS):
            j = start + tl.arange(0, BS)  # (BS,) group-major, as stored
            ok = j < GROUPS * n_splits
            piece = row * GROUPS * n_splits + j
            mine = tl.sum(tl.where((j // n_splits)[:, None] == g[None, :], factor[None, :], 0.0), 1)
            weight = tl.exp2(tl.load(m_ptr + piece, mask=ok, other=FLOOR) - top) * inverse * mine
            acc = tl.load(
                acc_ptr + piece[:, None] * DV + offs[None, :],
                mask=ok[:, None] & (offs[None, :] < DV),
                other=0.0,
            )  # (BS, DT)
            out += tl.sum(weight[:, None] * acc, 0)
        if BLEND:
            own = query + off + tl.zeros([DT], tl.int32)
            inside = (own >= 0) & (
                own < lk
            )  # what a query sees by the mask: causality and window never hide it
            if KEYS:
                inside = inside & (tl.load(keys_ptr + batch * lk + own, mask=inside, other=0) != 0)
            v_at = v_ptr + (head // GROUP).to(tl.int64) * v_h
            if PAGE > 0:
                page = tl.load(pages_ptr + batch * n_pages + own // PAGE, mask=inside, other=0).to(
                    tl.int64
                )
                v_at += page * v_b + own % PAGE * v_n
            else:
                v_at += batch * v_b + own.to(tl.int64) * v_n
            value = tl.load(v_at + offs * v_d, mask=inside & (offs < DV), other=0.0).to(tl.float32)
            u = tl.where(inside, tl.load(blend_ptr + head * blend_h).to(tl.float32), 0.0)
            out = (1.0 - u) * out + u * value
        if GAIN:
            out = out * tl.load(gain_ptr + batch * gain_b + head * gain_h + query * gain_m).to(
                tl.float32
            )
        to = out_ptr + batch * o_b + head * o_h + query * o_m + offs
        tl.store(to, out.to(out_ptr.dtype.element_ty), mask=offs < DV)
        if part == 0:
            tl.store(lse_ptr + row, lse)
            if RULE:
                tl.store(mass_ptr + row * GROUPS + g, mass, mask=g < GROUPS)
            if FACTORS:
                tl.store(factor_ptr + row * GROUPS + g, factor, mask=g < GROUPS)
