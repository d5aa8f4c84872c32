"""Attention received per key: column sums or maxima of A over the queries that see the key, without
building A.

received(k) = Σ_i A(i, k) or max_i A(i, k) over the rows i that count; A =
exp(temper·softcap(scale·q·k) + bias − lse), or that times what a rule leaves of the key's group in
the row, and with a blend u on the row's own key. The kernel is key-major: a program owns BLOCK_N
keys and walks over the query blocks that can see them, the columns' results staying in registers.
No atomics, so it is deterministic; the log-sum-exp comes from any forward pass.

Every condition on a pair is an interval: row i counts for column c if first ≤ i − c ≤ last
(causality, window, band and the cache offset together; keys kept beyond a window have an interval
of their own), so that a key block's rows are one run of query blocks, whose interior needs no mask.
A dense mask is loaded for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import HIDDEN, dot, soft_cap, tile


@triton.jit
def _sweep(
    acc, k, k2, bias, cols, valid, label, q_ptr, lse_ptr, temper_ptr, entries_ptr, dense_at,
    factor_ptr, blend_ptr, begin, end,
    stride_qm, stride_qd, stride_tm, dense_m, blend_m, lq, off, first, last, scale, cap,
    D: tl.constexpr, DP: tl.constexpr, DP2: tl.constexpr, BLOCK_M: tl.constexpr,
    LO: tl.constexpr, HI: tl.constexpr, CAP: tl.constexpr, LARGEST: tl.constexpr,
    DENSE: tl.constexpr, DENSE_HIDES: tl.constexpr, GROUPS: tl.constexpr, BLEND: tl.constexpr,
    MASK: tl.constexpr, INTERP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc (BLOCK_N,) joined with the weights of query blocks begin…end−1, or of those entries of
    the block list. MASK: some pair of these blocks does not count, or the last block is cut by the
    end of the queries."""
    offs = tl.arange(0, BLOCK_M)
    q_at = offs[:, None] * stride_qm
    for entry in tl.range(begin, end):
        if entries_ptr is not None:
            start = tl.load(entries_ptr + entry) * BLOCK_M
        else:
            start = entry * BLOCK_M
        q_block = q_ptr + start.to(tl.int64) * stride_qm
        rows = start + offs
        inside = rows < lq
        lse = tl.load(lse_ptr + start + offs)  # (BLOCK_M,), padded to whole blocks
        q = tile(q_block, q_at, stride_qd, inside, 0, DP, D, MASK, False)  # (BLOCK_M, DP)
        s = tl.zeros([cols.shape[0], BLOCK_M], tl.float32)
        # (BLOCK_N, BLOCK_M): the reduction stays within a warp
        s = dot(k, tl.trans(q), s, INTERP, PRECISION)
        if DP2:
            q2 = tile(q_block, q_at, stride_qd, inside, DP, DP2, D, MASK, False)
            s = dot(k2, tl.trans(q2), s, INTERP, PRECISION)
        gain = scale
        if CAP:
            s = soft_cap(s * scale, cap)
            gain = 1.0
        if temper_ptr is None:
            s = s * gain - lse[None, :]
        else:
            if MASK:
                temper = tl.load(
                    temper_ptr + rows * stride_tm, mask=inside, other=0.0
                )  # (BLOCK_M,)
            else:
                temper = tl.load(temper_ptr + rows * stride_tm)
            s = s * (gain * temper.to(tl.float32))[None, :] - lse[None, :]
        if bias is not None:
            s = s + bias[:, None]
        if DENSE:
            to = dense_at[:, None] + rows[None, :].to(tl.int64) * dense_m
            dense = tl.load(to, mask=valid[:, None] & inside[None, :], other=0)
            if DENSE == 1:
                s = tl.where(dense != 0, s, HIDDEN)
            else:
                dense = dense.to(tl.float32)
                s = s + tl.where(dense > DENSE_HIDES, dense * 1.4426950408889634, HIDDEN)
        p = tl.exp2(s)
        if GROUPS:  # what a rule leaves of the key's group in that row
            factor = tl.load(factor_ptr + rows * GROUPS, mask=inside, other=0.0)[None, :]
            for g in tl.static_range(1, GROUPS):
                other = tl.load(factor_ptr + rows * GROUPS + g, mask=inside, other=0.0)[None, :]
                factor = tl.where(label[:, None] == g, other, factor)
            p = p * factor
        if entries_ptr is not None:  # a row outside the set may hold anything, even NaN
            p = tl.where((lse >= 1e29)[None, :], 0.0, p)
        if BLEND:  # 0 in a row outside the set
            u = tl.load(blend_ptr + rows * blend_m, mask=inside, other=0.0)
            p += tl.where(rows[None, :] + off == cols[:, None], u[None, :], 0.0)
        if MASK:
            ahead = rows[None, :] - cols[:, None]
            if LO:
                p = tl.where(ahead >= first, p, 0.0)
            if HI:
                p = tl.where(ahead <= last, p, 0.0)
        if LARGEST:
            acc = tl.maximum(acc, tl.max(p, 1))
        else:
            acc += tl.sum(p, 1)
    return acc


@triton.jit(
    do_not_specialize=[
        "lq", "lk", "n", "off", "first", "last", "kept_first", "kept_last", "keep_first", "heads",
    ]
)  # fmt: skip
def received_kernel(
    q_ptr, k_ptr, lse_ptr, cols_ptr, keep_ptr, temper_ptr, bias_ptr, entries_ptr, before_ptr,
    dense_ptr, start_ptr, label_ptr, factor_ptr, blend_ptr, out_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_cb, stride_ch,
    stride_tb, stride_th, stride_tm, stride_bb, stride_bh, stride_bn,
    dense_b, dense_h, dense_m, dense_n, label_b, label_h, label_n, blend_b, blend_h, blend_m,
    heads, lq, lk, n, off, first, last, kept_first, kept_last, keep_first, scale, cap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DP2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, LO: tl.constexpr,
    HI: tl.constexpr, TAIL: tl.constexpr, CAP: tl.constexpr, LARGEST: tl.constexpr,
    KEPT: tl.constexpr, DENSE: tl.constexpr, DENSE_HIDES: tl.constexpr, GROUPS: tl.constexpr,
    LABELS: tl.constexpr, BLEND: tl.constexpr,
    INTERP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (x, y, z): keys x·BLOCK_N…, the HEADS query heads number y, part z of their query
    blocks.

    q (batch, heads, lq, D), k (batch, heads / GROUP, lk, D), lse (batch, heads, lq) in base 2 and
    NEVER where the row does not count, lq filled up to whole blocks; out (parts, batch, heads, n).
    scale and cap in base 2."""
    y = tl.program_id(1)
    sets = heads // HEADS
    batch = (y // sets).to(tl.int64)
    head = (y % sets) * HEADS  # all heads of the program share one key head
    part = tl.program_id(2)
    slots = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if cols_ptr is not None:
        cols = tl.load(
            cols_ptr + batch * stride_cb + head * stride_ch + slots, mask=slots < n, other=-1
        )
        valid = (cols >= 0) & (cols < lk)
        low = tl.min(tl.where(valid, cols, lk), 0)
        high = tl.max(tl.where(valid, cols, -1), 0)
    else:
        cols = slots
        valid = cols < lk
        low = tl.program_id(0) * BLOCK_N
        high = tl.minimum(low + BLOCK_N, lk) - 1

    if KEPT:  # these stay in sight beyond the window
        keep0 = tl.load(start_ptr + batch)
        kept = (cols >= keep0) & (cols < keep0 + keep_first)
        first = tl.where(kept, kept_first, first)
        last = tl.where(kept, kept_last, last)
        lows = cols + first
        highs = cols + last + 1

    # Query blocks begin…end−1 hold every row that counts for some key of low…high; in clear…over−1
    # all count for all.
    begin = 0
    clear = 0
    over = lq // BLOCK_M
    end = (lq + BLOCK_M - 1) // BLOCK_M
    if KEPT:
        earliest = tl.min(tl.where(valid, lows, lq), 0)
        latest = tl.max(tl.where(valid, lows, 0), 0)
        begin = tl.minimum(tl.maximum(earliest, 0), lq) // BLOCK_M
        clear = (tl.maximum(latest, 0) + BLOCK_M - 1) // BLOCK_M
        earliest = tl.min(tl.where(valid, highs, lq), 0)
        latest = tl.max(tl.where(valid, highs, 0), 0)
        end = (tl.minimum(tl.maximum(latest, 0), lq) + BLOCK_M - 1) // BLOCK_M
        over = tl.minimum(tl.maximum(earliest, 0), lq) // BLOCK_M
        first = first[:, None]
        last = last[:, None]
    else:
        if LO:
            begin = tl.minimum(tl.maximum(low + first, 0), lq) // BLOCK_M
            clear = (tl.maximum(high + first, 0) + BLOCK_M - 1) // BLOCK_M
        if HI:
            end = (tl.minimum(tl.maximum(high + last + 1, 0), lq) + BLOCK_M - 1) // BLOCK_M
            over = tl.minimum(tl.maximum(low + last + 1, 0), lq) // BLOCK_M
    end = tl.maximum(end, begin)
    clear = tl.minimum(tl.maximum(clear, begin), end)
    over = tl.minimum(tl.maximum(over, clear), end)
    if entries_ptr is not None:  # blocks → places in the list of the blocks that hold a member
        blocks = (lq + BLOCK_M - 1) // BLOCK_M
        before_ptr += batch * (blocks + 1)
        entries_ptr += batch * blocks
        begin = tl.load(before_ptr + begin)
        clear = tl.load(before_ptr + clear)
        over = tl.load(before_ptr + over)
        end = tl.load(before_ptr + end)
    share = (end - begin + tl.num_programs(2) - 1) // tl.num_programs(2)
    begin = tl.minimum(begin + part * share, end)
    end = tl.minimum(begin + share, end)
    clear = tl.minimum(tl.maximum(clear, begin), end)
    over = tl.minimum(tl.maximum(over, clear), end)

    k_from = k_ptr + batch * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    k_at = cols.to(tl.int64)[:, None] * stride_kn
    k = tile(k_from, k_at, stride_kd, valid, 0, DP, D, True, False)  # (BLOCK_N, DP)
    k2 = valid
    if DP2:
        k2 = tile(k_from, k_at, stride_kd, valid, DP, DP2, D, True, False)
    wanted = valid
    if keep_ptr is not None:
        wanted = valid & (tl.load(keep_ptr + batch * lk + cols, mask=valid, other=0) != 0)
    for one in range(HEADS):
        h = (head + one).to(tl.int64)
        q_head = q_ptr + batch * stride_qb + h * stride_qh
        row = batch * heads + h
        lse_head = lse_ptr + row * (tl.cdiv(lq, BLOCK_M) * BLOCK_M)
        temper_head = None
        if temper_ptr is not None:
            temper_head = temper_ptr + batch * stride_tb + h * stride_th
        bias = None
        if bias_ptr is not None:
            bias_tile = batch * stride_bb + h * stride_bh + cols * stride_bn
            bias = (
                tl.load(bias_ptr + bias_tile, mask=valid, other=0.0).to(tl.float32)
                * 1.4426950408889634
            )
        dense_at = dense_ptr
        if DENSE:
            dense_at = dense_ptr + batch * dense_b + h * dense_h + cols.to(tl.int64) * dense_n
        label = cols
        if LABELS:
            to = label_ptr + batch * label_b + h * label_h + cols * label_n
            label = tl.load(to, mask=valid, other=0).to(tl.int32)
        factor_head = factor_ptr
        if GROUPS:
            factor_head = factor_ptr + row * lq * GROUPS
        blend_head = blend_ptr
        if BLEND:
            blend_head = blend_ptr + batch * blend_b + h * blend_h
        acc = tl.zeros([BLOCK_N], tl.float32)
        if LO:
            acc = _sweep(
                acc, k, k2, bias, cols, valid, label, q_head, lse_head, temper_head, entries_ptr,
                dense_at, factor_head, blend_head, begin, clear,
                stride_qm, stride_qd, stride_tm, dense_m, blend_m, lq, off, first, last, scale, cap,
                D, DP, DP2, BLOCK_M, LO, HI, CAP, LARGEST, DENSE, DENSE_HIDES, GROUPS, BLEND,
                True, INTERP, PRECISION,
            )  # fmt: skip
        acc = _sweep(
            acc, k, k2, bias, cols, valid, label, q_head, lse_head, temper_head, entries_ptr,
            dense_at, factor_head, blend_head, clear, over,
            stride_qm, stride_qd, stride_tm, dense_m, blend_m, lq, off, first, last, scale, cap,
            D, DP, DP2, BLOCK_M, LO, HI, CAP, LARGEST, DENSE, DENSE_HIDES, GROUPS, BLEND,
            False, INTERP, PRECISION,
        )  # fmt: skip
        if TAIL:
            acc = _sweep(
                acc, k, k2, bias, cols, valid, label, q_head, lse_head, temper_head, entries_ptr,
                dense_at, factor_head, blend_head, over, end,
                stride_qm, stride_qd, stride_tm, dense_m, blend_m, lq, off, first, last, scale, cap,
                D, DP, DP2, BLOCK_M, LO, HI, CAP, LARGEST, DENSE, DENSE_HIDES, GROUPS, BLEND,
                True, INTERP, PRECISION,
            )  # fmt: skip
        # a padding key was worked out like any other: its weight is what it would have been
        acc = tl.where(wanted, acc, 0.0)
        place = (part.to(tl.int64) * (tl.num_programs(1) * HEADS) + row) * n
        tl.store(out_ptr + place + slots, acc, mask=slots < n)
