"""Attention received per key: column sums or maxima of A over the queries that see the key, without
building A.

received(k) = Σ_i A(i, k) or max_i A(i, k) over the rows i that count; A =
exp(temper·softcap(scale·q·k) + bias − lse). The kernel is key-major: a program owns BLOCK_N keys
and walks over the query blocks that can see them, the columns' results staying in registers. No
atomics, so it is deterministic; the log-sum-exp comes from any forward pass.

Every condition on a pair is an interval: row i counts for column c if first ≤ i − c ≤ last
(causality, window, band and the cache offset together), so that a key block's rows are one run of
query blocks, whose interior needs no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call
from ..masking import FLOOR
from ..reference import pick
from ..request import Mask, Received
from . import configs
from .primitives import (
    DTYPES,
    INTERPRETED,
    LOG2E,
    MAX_DIM,
    device_of,
    dot,
    flags,
    parts,
    precision,
    schema,
    soft_cap,
    strides,
    tile,
)

#: Log-sum-exp of a row that does not count or sees nothing: exp2(anything − NEVER) = 0.
NEVER = 1e30


@dataclass(frozen=True)
class Config:
    """keys a program, queries a tile, then what Triton is told; and how many programs fill the
    device: with fewer (short lists of keys) the heads of a group and the query range are shared
    out, the parts being added up after."""

    keys: int
    queries: int
    warps: int
    stages: int
    programs: int = 264


def config(d: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Tiles by head dimension and GPU family."""
    if INTERPRETED:
        return Config(32, 32, 1, 1, programs=1)
    if dtype == torch.float32:  # three tf32 products and twice the bytes
        if d <= 128:
            family = configs.family(device)  # elsewhere than on Hopper the wider tile spills
            if d <= 96 or family == 90:
                return Config(64, 32, 4, 2)
            return Config(32 if family == 100 else 64, 16, 4, 2)
        return Config(16, 32, 8, 2)
    if d <= 64:
        return Config(128, 64, 4, 3)
    return Config(128, 64, 8, 3) if d <= 128 else Config(64, 64, 4, 2)


@triton.jit
def _sweep(  # noqa: PLR0913
    acc, k, k2, bias, cols, q_ptr, lse_ptr, temper_ptr, entries_ptr, begin, end,
    stride_qm, stride_qd, stride_tm, lq, first, last, scale, cap,
    D: tl.constexpr, DP: tl.constexpr, DP2: tl.constexpr, BLOCK_M: tl.constexpr,
    LO: tl.constexpr, HI: tl.constexpr, CAP: tl.constexpr, LARGEST: tl.constexpr,
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
        p = tl.exp2(s)
        if entries_ptr is not None:  # a row outside the set may hold anything, even NaN
            p = tl.where((lse >= 1e29)[None, :], 0.0, p)
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


@triton.jit(do_not_specialize=["lq", "lk", "n", "first", "last", "heads"])
def received_kernel(  # noqa: PLR0913
    q_ptr, k_ptr, lse_ptr, cols_ptr, keep_ptr, temper_ptr, bias_ptr, entries_ptr, before_ptr,
    out_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_cb, stride_ch,
    stride_tb, stride_th, stride_tm, stride_bb, stride_bh, stride_bn,
    heads, lq, lk, n, first, last, scale, cap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DP2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, LO: tl.constexpr,
    HI: tl.constexpr, TAIL: tl.constexpr, CAP: tl.constexpr, LARGEST: tl.constexpr,
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

    # Query blocks begin…end−1 hold every row that counts for some key of low…high; in clear…over−1
    # all count for all.
    begin = 0
    clear = 0
    over = lq // BLOCK_M
    end = (lq + BLOCK_M - 1) // BLOCK_M
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
        acc = tl.zeros([BLOCK_N], tl.float32)
        if LO:
            acc = _sweep(
                acc, k, k2, bias, cols, q_head, lse_head, temper_head, entries_ptr, begin, clear,
                stride_qm, stride_qd, stride_tm, lq, first, last, scale, cap,
                D, DP, DP2, BLOCK_M, LO, HI, CAP, LARGEST, True, INTERP, PRECISION,
            )  # fmt: skip
        acc = _sweep(
            acc, k, k2, bias, cols, q_head, lse_head, temper_head, entries_ptr, clear, over,
            stride_qm, stride_qd, stride_tm, lq, first, last, scale, cap,
            D, DP, DP2, BLOCK_M, LO, HI, CAP, LARGEST, False, INTERP, PRECISION,
        )  # fmt: skip
        if TAIL:
            acc = _sweep(
                acc, k, k2, bias, cols, q_head, lse_head, temper_head, entries_ptr, over, end,
                stride_qm, stride_qd, stride_tm, lq, first, last, scale, cap,
                D, DP, DP2, BLOCK_M, LO, HI, CAP, LARGEST, True, INTERP, PRECISION,
            )  # fmt: skip
        # a padding key was worked out like any other: its weight is what it would have been
        acc = tl.where(wanted, acc, 0.0)
        place = (part.to(tl.int64) * (tl.num_programs(1) * HEADS) + row) * n
        tl.store(out_ptr + place + slots, acc, mask=slots < n)


@dataclass(frozen=True)
class _Arguments:
    """What the operator takes."""

    q: Tensor
    k: Tensor
    lse: Tensor
    cols: Tensor | None
    keep: Tensor | None
    temper: Tensor | None
    bias: Tensor | None
    entries: Tensor | None
    before: Tensor | None
    first: int | None
    last: int | None
    scale: float
    softcap: float | None
    largest: bool
    heads: int
    parts: int
    block_n: int
    block_m: int
    warps: int
    stages: int


@torch.library.custom_op("interp::received", mutates_args=(), schema=schema(_Arguments, "Tensor"))
def _received(*values: Any) -> Tensor:
    """(parts, batch, heads, n) float32: every part of the query blocks reduced by itself."""
    x = _Arguments(*values)
    batch, n_heads, lq, d = x.q.shape
    lk = x.k.shape[2]
    n = lk if x.cols is None else x.cols.shape[2]
    out = x.q.new_empty(x.parts, batch, n_heads, n, dtype=torch.float32)
    grid = (triton.cdiv(n, x.block_n), batch * n_heads // x.heads, x.parts)
    with device_of(x.q):
        received_kernel[grid](
            x.q,
            x.k,
            x.lse,
            x.cols,
            x.keep,
            x.temper,
            x.bias,
            x.entries,
            x.before,
            out,
            *strides(x.q, 4)[:3],
            x.q.stride(3),
            *strides(x.k, 4)[:3],
            x.k.stride(3),
            *strides(x.cols, 3)[:2],
            *strides(x.temper, 3),
            *strides(x.bias, 3),
            n_heads,
            lq,
            lk,
            n,
            x.first or 0,
            x.last or 0,
            x.scale * LOG2E,
            (x.softcap or 1.0) * LOG2E,
            GROUP=n_heads // x.k.shape[1],
            HEADS=x.heads,
            D=d,
            DP=parts(d)[0],
            DP2=parts(d)[1],
            BLOCK_N=x.block_n,
            BLOCK_M=x.block_m,
            LO=x.first is not None,
            HI=x.last is not None,
            TAIL=x.last is not None or lq % x.block_m != 0,
            CAP=x.softcap is not None,
            LARGEST=x.largest,
            INTERP=INTERPRETED,
            PRECISION=precision(x.q.dtype),
            num_warps=x.warps,
            num_stages=x.stages,
            enable_fp_fusion=True,
        )
    return out


@_received.register_fake
def _(*values: Any) -> Tensor:
    x = _Arguments(*values)
    n = x.k.shape[2] if x.cols is None else x.cols.shape[2]
    return x.q.new_empty(x.parts, x.q.shape[0], x.q.shape[1], n, dtype=torch.float32)


def interval(
    mask: Mask, band: tuple[int, int] | None, lq: int, lk: int
) -> tuple[int | None, int | None]:
    """(first, last): row i counts for column c if first ≤ i − c ≤ last; None where no pair of the
    call fails it."""
    low: list[int] = [0] if mask.causal else []
    high: list[int] = []
    if mask.window is not None:
        low, high = [*low, 1 - mask.window], [mask.window - 1]
    if band is not None:
        low, high = [*low, band[0]], [*high, band[1]]
    off = mask.q_start - mask.k_start  # row i stands at column i + off
    first = max(low) - off if low else -lk
    last = min(high) - off if high else lq
    # i − c runs from 1 − lk to lq − 1: what lies beyond is cut, so that nothing overflows in the
    # kernel
    return (min(first, lq) if first > 1 - lk else None), (max(last, -lk) if last < lq - 1 else None)


def member_blocks(rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of rows (batch, queries) bool: the blocks that hold a member, ascending, (batch, blocks)
    int32 with the unused end 0; and (batch, blocks + 1) int32, how many of them come before each
    block. Nothing waits for the device."""
    batch, lq = rows.shape
    n = triton.cdiv(lq, block)
    held = F.pad(rows, (0, n * block - lq)).view(batch, n, block).any(-1)
    before = F.pad(held.cumsum(1), (1, 0))
    place = torch.where(held, before[:, :-1], n)  # n: a place past the end, cut off again
    blocks = torch.arange(n, dtype=torch.int32, device=rows.device).expand(batch, n)
    entries = torch.zeros(batch, n + 1, dtype=torch.int32, device=rows.device).scatter_(
        1, place, blocks
    )
    return entries[:, :n].contiguous(), before.to(torch.int32)


@torch.no_grad()
def received(call: Call, lse: Tensor, question: Received) -> tuple[Tensor, Tensor]:
    """(received, count): (batch, heads, keys) float32, or (batch, heads, n) for `question.keys`,
    reduced over the real rows of the question that see the key, 0 where there are none; and
    `Visibility.key_counts`, (batch, 1, keys).

    logits = temper·softcap(scale·q·k) + bias, with q and k in any layout and temper and bias of the
    call's edit; lse (batch, heads, queries) natural, of those logits and of the sink if there is
    one, −inf where a row sees nothing.

    Query blocks without a counted row are skipped, so the cost is in proportion to the blocks of a
    row set or band; a list of keys costs by its blocks and, under a window or band, the less the
    closer together its columns stand.
    """
    q, k, vis, mask = call.q, call.k, call.vis, call.mask
    if mask.dense is not None:
        raise ValueError(
            "mask.dense is not supported by the fused column pass; use masks of keys, windows and "
            "bands."
        )
    (batch, heads, lq, d), lk = q.shape, k.shape[2]
    if q.dtype not in DTYPES or k.dtype != q.dtype or d > MAX_DIM:
        raise ValueError(
            f"Not supported by the fused column pass: q {q.dtype}, k {k.dtype}, head dimension {d}."
        )
    if vis.keep_first:
        raise ValueError(
            "The key-major pass knows no keys kept beyond the window (mask.keep_first)."
        )
    count = vis.key_counts(question)
    cols = None if question.keys is None else question.keys.to(q.device)
    n = lk if cols is None else cols.shape[2]
    tiles = config(d, q.dtype, q.device)

    base2 = torch.where(lse <= FLOOR, NEVER, lse.float() * LOG2E)
    entries = before = None
    if vis.rows is not None or question.queries is not None:
        rows = vis.row_set(question.queries)
        base2 = torch.where(rows[:, None], base2, NEVER)
        entries, before = member_blocks(rows, tiles.queries)

    base2 = F.pad(base2, (0, -lq % tiles.queries), value=NEVER).contiguous()

    if q.numel() and n:
        first, last = interval(mask, question.band, lq, lk)
        together, parts = _shares(call, question, (first, last), tiles)
        parted = _received(
            q,
            k,
            base2,
            None if cols is None else cols.to(torch.int32).contiguous(),
            None if vis.keys is None else flags(vis.keys.contiguous()),
            call.steer.temper,
            call.steer.bias,
            entries,
            before,
            first,
            last,
            call.scale,
            call.softcap,
            question.reduce == "max",
            together,
            max(1, parts),
            tiles.keys,
            tiles.queries,
            tiles.warps,
            tiles.stages,
        )
        answer = (
            parted[0]
            if len(parted) == 1
            else parted.amax(0)
            if question.reduce == "max"
            else parted.sum(0)
        )
    else:
        answer = q.new_zeros(batch, heads, n, dtype=torch.float32)
    if question.reduce == "mean":
        counted = count if cols is None else pick(count.expand(-1, cols.shape[1], -1), cols.long())
        answer = answer / counted.clamp_min(1)
    return answer, count


def _shares(
    call: Call, question: Received, reach: tuple[int | None, int | None], tiles: Config
) -> tuple[int, int]:
    """(query heads a program, parts of the query range): heads of a group share one program and its
    key tile, unless each has its own list or programs are few."""
    (batch, heads, lq, _), (kv_heads, lk), cols = call.q.shape, call.k.shape[1:3], question.keys
    blocks = triton.cdiv(lk if cols is None else cols.shape[2], tiles.keys)
    own = cols is not None and cols.shape[1] > 1
    few = blocks * batch * kv_heads < tiles.programs
    together = 1 if own or few else heads // kv_heads
    first, last = reach
    rows = (
        lq
        if first is None or last is None
        else min(lq, last - first + (tiles.keys if cols is None else lk))
    )
    parts = min(
        tiles.programs // (blocks * batch * heads // together), triton.cdiv(rows, 8 * tiles.queries)
    )
    return together, parts


def sampled_blocks(
    batch: int,
    queries: int,
    share: int = 8,
    block: int = 64,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A row set (batch, queries) bool for `Received.queries`: of every `share` consecutive blocks
    of queries one, at random. Every row is in with probability 1 / share, so share · the sum over
    the set is an unbiased estimate of the full sum, and the mean a consistent one. With fewer than
    `share` blocks, one of them."""
    blocks = triton.cdiv(queries, block)
    share = max(1, min(share, blocks))
    chosen = torch.randint(
        share, (batch, triton.cdiv(blocks, share)), generator=generator, device=device
    )
    row = torch.arange(queries, device=device) // block
    return chosen[:, row // share] == row % share
