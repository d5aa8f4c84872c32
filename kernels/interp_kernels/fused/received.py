"""Launching the key-major pass: attention received per key, asked in `Received`'s ways.

`received_kernel` has the formula. Query blocks that hold no counted row are left out by a list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..call import Call
from ..masking import FLOOR
from ..reference import pick
from ..request import Mask, Received
from . import configs
from .edited import Edited
from .primitives import (
    DTYPES,
    INTERPRETED,
    LOG2E,
    MAX_DIM,
    dense_kind,
    device_of,
    flags,
    hides,
    loadable,
    parts,
    precision,
    schema,
    strides,
)
from .received_kernel import received_kernel

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
    if d > 256 and configs.family(device) in (89, 120):  # shared memory
        return Config(64, 32, 4, 2)
    if d <= 64:
        return Config(128, 64, 4, 3)
    return Config(128, 64, 8, 3) if d <= 128 else Config(64, 64, 4, 2)


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
    dense: Tensor | None
    starts: Tensor | None
    labels: Tensor | None
    factors: Tensor | None
    blend: Tensor | None
    offset: int
    first: int | None
    last: int | None
    kept_first: int | None
    kept_last: int | None
    keep_first: int
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
    dense = loadable(x.dense)
    kept = x.starts is not None
    first, last = (x.first is not None or kept), (x.last is not None or kept)
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
            dense,
            x.starts,
            x.labels,
            x.factors,
            x.blend,
            out,
            *strides(x.q, 4)[:3],
            x.q.stride(3),
            *strides(x.k, 4)[:3],
            x.k.stride(3),
            *strides(x.cols, 3)[:2],
            *strides(x.temper, 3),
            *strides(x.bias, 3),
            *strides(dense, 4),
            *strides(x.labels, 3),
            *strides(x.blend, 3),
            n_heads,
            lq,
            lk,
            n,
            x.offset,
            -lk if x.first is None else x.first,
            lq if x.last is None else x.last,
            -lk if x.kept_first is None else x.kept_first,
            lq if x.kept_last is None else x.kept_last,
            x.keep_first,
            x.scale * LOG2E,
            (x.softcap or 1.0) * LOG2E,
            GROUP=n_heads // x.k.shape[1],
            HEADS=x.heads,
            D=d,
            DP=parts(d)[0],
            DP2=parts(d)[1],
            BLOCK_N=x.block_n,
            BLOCK_M=x.block_m,
            LO=first,
            HI=last,
            TAIL=last or lq % x.block_m != 0,
            CAP=x.softcap is not None,
            LARGEST=x.largest,
            KEPT=kept,
            DENSE=dense_kind(x.dense),
            DENSE_HIDES=hides(dense),
            GROUPS=0 if x.factors is None else x.factors.shape[-1],
            LABELS=x.labels is not None,
            BLEND=x.blend is not None,
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
def received(
    call: Call, lse: Tensor, question: Received, edited: Edited = Edited()
) -> tuple[Tensor, Tensor]:
    """(received, count): (batch, heads, keys) float32, or (batch, heads, n) for `question.keys`,
    reduced over the real rows of the question that see the key, 0 where there are none; and
    `Visibility.key_counts`, (batch, 1, keys).

    logits = temper·softcap(scale·q·k) + bias, with q and k in any layout and temper and bias of the
    call's edit; lse (batch, heads, queries) natural, of those logits and of the sink if there is
    one, −inf where a row sees nothing; edited: what rules and a blend made of the weights.

    Query blocks without a counted row are skipped, so the cost is in proportion to the blocks of a
    row set or band; a list of keys costs by its blocks and, under a window or band, the less the
    closer together its columns stand.
    """
    q, k, vis, mask = call.q, call.k, call.vis, call.mask
    (batch, heads, lq, d), lk = q.shape, k.shape[2]
    if q.dtype not in DTYPES or k.dtype != q.dtype or d > MAX_DIM:
        raise ValueError(
            f"Not supported by the fused column pass: q {q.dtype}, k {k.dtype}, head dimension {d}."
        )
    count = vis.key_counts(question)
    cols = None if question.keys is None else question.keys.to(q.device)
    n = lk if cols is None else cols.shape[2]
    tiles = config(d, q.dtype, q.device)

    base2 = torch.where(lse <= FLOOR, NEVER, lse.float() * LOG2E)
    entries = before = None
    blend = edited.blend
    if vis.rows is not None or question.queries is not None:
        rows = vis.row_set(question.queries)
        base2 = torch.where(rows[:, None], base2, NEVER)
        entries, before = member_blocks(rows, tiles.queries)
        blend = None if blend is None else blend * rows[:, None]

    base2 = F.pad(base2, (0, -lq % tiles.queries), value=NEVER).contiguous()

    if q.numel() and n:
        first, last = interval(mask, question.band, lq, lk)
        beyond = first, last
        if vis.keep_first:
            beyond = interval(replace(mask, window=None), question.band, lq, lk)
        together, parts = _shares(call, question, beyond, tiles)
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
            None if mask.dense is None else mask.dense.to(q.device),
            vis.kept_from,
            edited.labels,
            edited.factors,
            blend,
            vis.offset,
            first,
            last,
            *beyond,
            vis.keep_first,
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
        counted = count
        if cols is not None:
            apart = max(count.shape[1], cols.shape[1])
            counted = pick(count.expand(-1, apart, -1), cols.long())
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
