"""Attention of few query rows over a long cache: split over the keys, with edits, raw scores and
exact top-k keys.

Decode is bound by reading the cache, so everything else rides along: a rule's groups are further
rows of the same tile, raw scores add 4 bytes a (head, key), the strongest keys come from the tiles'
maxima.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..call import Call
from .configs import processors
from .decode_kernels import combine_kernel, split_kernel
from .primitives import (
    DTYPES,
    INTERPRETED,
    LOG2E,
    MAX_DIM,
    MAX_GROUPS,
    device_of,
    flags,
    hides,
    padded_dim,
    parts,
    precision,
    schema,
    strides,
)

#: Keys a tile under the interpreter or, for tests, anywhere; None: what `config` says.
_BLOCK_N: int | None = 32 if INTERPRETED else None
#: A program has at least so many keys.
_MIN_KEYS = 256
#: Above, or with more tiles, top-k is torch's.
_MAX_TOPK, _MAX_TILES = 16, 8192
#: Spans passed to the kernel as numbers; more become labels.
_MAX_SPANS = 4


@dataclass
class Decoded:
    """out (batch, heads, queries, d_v) in v's dtype; lse (batch, heads, queries) float32, natural
    log, before the rule (−inf where nothing is visible; includes the sink logit). Where asked:
    scores (batch, heads, queries, keys) float32, the logits after soft-cap, temper and bias, −inf
    where hidden; topk_index (batch, heads, queries, k) int64 columns, strongest first, −1 where
    fewer are visible; topk_prob float32, exp(score − lse); masses (batch, heads, queries, groups)
    float32 before the rule."""

    out: Tensor
    lse: Tensor
    scores: Tensor | None = None
    topk_index: Tensor | None = None
    topk_prob: Tensor | None = None
    masses: Tensor | None = None


def config(dim: int, itemsize: int, rows: int) -> tuple[int, int, int, int]:
    """(rows of a tile, keys a tile, warps, stages) for the larger head dimension, bytes an element
    and the rows there are. No spills on sm_90 but for float32 of 256 dimensions; for 16-bit decode
    two programs fit a multiprocessor, whose loads in flight saturate its bandwidth. More rows
    become further programs, which find the keys in L2."""
    width = padded_dim(dim) * itemsize  # bytes of a key
    most = 16 if itemsize == 4 else 64 if width <= 256 else 32
    block_m = min(max(16, triton.next_power_of_2(rows)), most)
    block_n = 64 if width <= 256 and block_m == 16 else 32 if width <= 512 else 16
    warps = 4 if itemsize == 2 and (block_m == 16 or (block_m == 32 and width <= 256)) else 8
    return block_m, _BLOCK_N or block_n, warps, 3 if width <= 512 else 2


def decode(
    call: Call,
    *,
    topk: int = 0,
    scores: bool = False,
    pages: Tensor | None = None,
    stands: Tensor | None = None,
    n_splits: int | None = None,
) -> Decoded:
    """softmax(temper·softcap(scale·q·k) + bias)·v under the call's edit, and what is asked of the
    scores; no gradients.

    q, k and v in any strides, one of `DTYPES`. With pages (batch, n_pages) int32 column c is slot
    c % size of page pages[b, c // size] of k and v (total_pages, kv_heads, size, d); the table's
    unused entries are not read if mask hides their columns. stands (queries,) int: the column each
    row stands at, in place of mask.q_start − mask.k_start + i (rows chosen from a prompt).
    n_splits: pieces of the keys; None: enough to fill the device.
    """
    _check(call, pages, stands)
    q, vis, mask, steer = call.q, call.vis, call.mask, call.steer
    lo, hi = vis.span(0, vis.lq) if stands is None else (0, vis.lk)
    rule = steer.rules[0] if steer.rules else None
    labels, spans = steer.labels, [x for span in steer.spans for x in span]
    if len(steer.spans) > _MAX_SPANS:
        labels, spans = steer.labels_of(vis.lk, q.device).to(torch.uint8), []

    given: list[Tensor | None] = (
        [] if rule is None else [rule.keep, rule.receive, rule.tests, rule.bounds, rule.rows]
    )
    given += [None] * (5 - len(given))

    def here(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(q.device)

    out, lse, raw, index, prob, masses = _decode(
        q,
        call.k,
        call.v,
        pages,
        vis.keys,
        vis.rows,
        here(call.sinks),
        here(steer.temper),
        here(steer.bias),
        here(labels),
        here(steer.blend),
        here(steer.gain),
        *(here(x) for x in given),
        rule is not None and rule.renormalise,
        spans,
        call.scale,
        call.softcap,
        mask.causal,
        mask.window,
        vis.offset,
        lo,
        hi,
        topk,
        scores,
        n_splits,
        None if stands is None else stands.to(q.device, torch.int32),
    )
    return Decoded(
        out,
        lse,
        raw if scores else None,
        index if topk else None,
        prob if topk else None,
        masses if rule is not None else None,
    )


def _check(call: Call, pages: Tensor | None, stands: Tensor | None) -> None:
    """Raise `ValueError` for what these kernels do not know."""
    q, k, v, vis, steer = call.q, call.k, call.v, call.vis, call.steer
    if call.mask.dense is not None:
        raise ValueError("decode knows no dense mask; use the keys of the mask or steer.bias.")
    if q.dtype != k.dtype or k.dtype not in DTYPES or v.dtype not in DTYPES:
        raise ValueError(
            f"decode needs q and k of one dtype of {DTYPES}; here {q.dtype}, {k.dtype}, {v.dtype}."
        )
    shapes = k.shape[:3] == v.shape[:3] and k.shape[3] == q.shape[3]
    if max(q.shape[3], v.shape[3]) > MAX_DIM or q.shape[1] % k.shape[1] or not shapes:
        raise ValueError(
            f"decode cannot serve q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    _check_pages(call, pages)
    if steer.sigmoid is not None:
        raise ValueError("decode knows no steer.sigmoid.")
    if len(call.steers) > 1 or len(steer.rules) > 1 or steer.groups > MAX_GROUPS:
        raise ValueError(f"decode knows one rule, over up to {MAX_GROUPS} groups of keys.")
    if vis.keep_first:
        raise ValueError("decode knows no keys kept beyond the window (mask.keep_first).")
    if stands is not None and (steer.blend is not None or tuple(stands.shape) != (vis.lq,)):
        raise ValueError(
            f"stands has shape {tuple(stands.shape)}, expected ({vis.lq},), and goes without "
            "steer.blend."
        )


def _check_pages(call: Call, pages: Tensor | None) -> None:
    """Raise `ValueError` if the cache, or its table of pages, is not one of this batch."""
    batch, (blocks, _, size, _) = call.q.shape[0], call.k.shape
    if pages is None and blocks != batch:
        raise ValueError(f"q has a batch of {batch}, k of {blocks}.")
    if pages is not None and (size < 16 or size & (size - 1) or pages.shape[0] != batch):
        raise ValueError(
            f"Pages of {size} keys, table {tuple(pages.shape)}: sizes are powers of two from 16."
        )


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _outputs(
    q: Tensor, v: Tensor, lk: int, keep: Tensor | None, topk: int, scores: bool
) -> _Outputs:
    batch, heads, lq, _ = q.shape
    return (
        # the layout of a model's q, so that its (batch, queries, heads, d_v) view is contiguous
        v.new_empty(batch, lq, heads, v.shape[3]).transpose(1, 2),
        q.new_empty(batch, heads, lq, dtype=torch.float32),
        q.new_empty((batch, heads, lq, lk) if scores else (0,), dtype=torch.float32),
        q.new_empty((batch, heads, lq, topk) if topk else (0,), dtype=torch.int64),
        q.new_empty((batch, heads, lq, topk) if topk else (0,), dtype=torch.float32),
        q.new_empty(
            (0,) if keep is None else (batch, heads, lq, keep.shape[1]), dtype=torch.float32
        ),
    )


def _cut(
    tiles: int, block: int, programs: int, device: torch.device, asked: int | None
) -> tuple[int, int]:
    """(pieces of the keys, tiles a piece): two programs a multiprocessor, not fewer than
    `_MIN_KEYS` keys each."""
    wanted = asked or min(
        max(2 * processors(device.index) // programs, 1), max(tiles * block // _MIN_KEYS, 1)
    )
    per_split = max(-(-tiles // wanted), 1)
    return max(-(-tiles // per_split), 1), per_split


@dataclass(frozen=True)
class _Arguments:
    """What the operator takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    pages: Tensor | None
    keys: Tensor | None
    real: Tensor | None
    sinks: Tensor | None
    temper: Tensor | None
    bias: Tensor | None
    labels: Tensor | None
    blend: Tensor | None
    gain: Tensor | None
    keep: Tensor | None
    receive: Tensor | None
    tests: Tensor | None
    bounds: Tensor | None
    rows: Tensor | None
    renormalise: bool
    spans: Sequence[int]
    scale: float
    softcap: float | None
    causal: bool
    window: int | None
    offset: int
    lo: int
    hi: int
    topk: int
    scores: bool
    n_splits: int | None
    stands: Tensor | None


@torch.library.custom_op(
    "interp::decode",
    mutates_args=(),
    schema=schema(_Arguments, "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"),
)
def _decode(*values: Any) -> _Outputs:
    x = _Arguments(*values)
    q, k, v, pages, keep = x.q, x.k, x.v, x.pages, x.keep
    batch, heads, lq, d = q.shape
    n_kv, d_v = v.shape[1], v.shape[3]
    page = 0 if pages is None else k.shape[2]
    lk = k.shape[2] if pages is None else pages.shape[1] * page
    made = _outputs(q, v, lk, keep, x.topk, x.scores)
    out, lse, raw, index, prob, masses = made
    if not out.numel():
        return made
    groups = 1 if keep is None else keep.shape[1]
    rows_per_kv = heads // n_kv * lq
    itemsize = max(k.dtype.itemsize, v.dtype.itemsize)
    block_m, block_n, warps, stages = config(max(d, d_v), itemsize, rows_per_kv * groups)
    first = x.lo // block_n
    tiles = -(-(x.hi - first * block_n) // block_n)
    blocks_m = -(-rows_per_kv * groups // block_m)
    splits, per_split = _cut(tiles, block_n, batch * n_kv * blocks_m, q.device, x.n_splits)

    keyed = x.scores or x.topk > 0
    if x.scores and (first or x.hi < lk):
        raw.fill_(float("-inf"))  # columns that no program visits
    elif keyed and not x.scores:
        raw = q.new_empty((batch, heads, lq, lk), dtype=torch.float32)
    tops = q.new_empty((batch, heads, lq, tiles) if keyed else (0,), dtype=torch.float32)
    m, den = q.new_empty(2, batch, heads, lq, groups, splits, dtype=torch.float32)
    acc = q.new_empty(batch, heads, lq, groups, splits, d_v, dtype=torch.float32)
    in_kernel = x.topk if x.topk <= _MAX_TOPK and tiles <= _MAX_TILES else 0
    pages, keys, real, rows = (
        None if t is None else t.contiguous() for t in (x.pages, x.keys, x.real, x.rows)
    )
    keep, receive, tests, bounds = (
        None if t is None else t.contiguous() for t in (x.keep, x.receive, x.tests, x.bounds)
    )
    n_pages = 0 if pages is None else pages.shape[1]
    dim_v = padded_dim(d_v)
    # few rows: the output's dimensions are shared out, so that the partial sums are read by many
    # programs
    dim_t = (
        dim_v
        if batch * heads * lq >= processors(q.device.index) or dim_v < 64
        else max(32, dim_v // 4)
    )
    edges = [*x.spans, *[0] * (3 * _MAX_SPANS - len(x.spans))]
    with device_of(q):
        split_kernel[(splits, batch * n_kv, blocks_m)](
            q,
            k,
            v,
            pages,
            flags(keys),
            x.bias,
            x.labels,
            x.temper,
            x.stands,
            m,
            den,
            acc,
            raw,
            tops,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            strides(keys, 2)[0],
            *strides(x.bias, 3),
            *strides(x.labels, 3),
            *strides(x.temper, 3),
            n_pages,
            lq,
            rows_per_kv,
            lk,
            x.hi,
            first,
            tiles,
            per_split,
            splits,
            x.offset,
            x.window or 0,
            x.scale * LOG2E,
            (x.softcap or 0.0) * LOG2E,
            *edges,
            KV=n_kv,
            GROUP=heads // n_kv,
            GROUPS=groups,
            BM=block_m,
            BN=block_n,
            D=d,
            DP=parts(d)[0],
            DP2=parts(d)[1],
            DV=d_v,
            DVP=parts(d_v)[0],
            DVP2=parts(d_v)[1],
            PAGE=page,
            CAUSAL=x.causal,
            WINDOW=x.window is not None,
            KEYS=keys is not None,
            SOFTCAP=x.softcap is not None,
            TEMPER=x.temper is not None,
            BIAS=x.bias is not None,
            HIDES=hides(x.bias),
            BIAS_HEADS=x.bias is not None and x.bias.shape[1] > 1,
            LABELS=x.labels is not None,
            LABEL_HEADS=x.labels is not None and x.labels.shape[1] > 1,
            SPANS=len(x.spans) // 3,
            SCORES=keyed,
            STANDS=x.stands is not None,
            INTERP=INTERPRETED,
            PRECISION=precision(k.dtype),
            V_PRECISION=precision(v.dtype),
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
        combine_kernel[(batch * heads * lq, dim_v // dim_t + (in_kernel > 0))](
            m,
            den,
            acc,
            raw,
            tops,
            v,
            pages,
            flags(keys),
            x.sinks,
            flags(real),
            keep,
            receive,
            tests,
            bounds,
            flags(rows),
            x.blend,
            x.gain,
            out,
            lse,
            masses,
            index,
            prob,
            *v.stride(),
            *out.stride()[:3],
            strides(keep, 2)[0],
            strides(receive, 2)[0],
            *strides(x.blend, 1),
            *strides(x.gain, 3),
            splits,
            lq,
            lk,
            x.hi,
            first,
            tiles,
            x.offset,
            n_pages,
            HEADS=heads,
            GROUP=heads // n_kv,
            GROUPS=groups,
            GP=triton.next_power_of_2(groups),
            SP=triton.next_power_of_2(splits),
            DV=d_v,
            DVP=dim_v,
            DT=dim_t,
            PAGE=page,
            BS=32 if dim_t <= 128 else 16,
            SINK=x.sinks is not None,
            KEYS=keys is not None,
            REAL=real is not None,
            RULE=keep is not None,
            RECEIVE=receive is not None,
            RENORMALISE=x.renormalise,
            TESTS=0 if tests is None else tests.shape[0],
            WHERE=rows is not None,
            BLEND=x.blend is not None,
            GAIN=x.gain is not None,
            K=in_kernel,
            KP=triton.next_power_of_2(max(in_kernel, 1)),
            TILES=triton.next_power_of_2(max(tiles, 1)),
            BN=block_n,
            num_warps=4,
            enable_fp_fusion=True,
        )
    if x.topk and not in_kernel:
        _top_by_torch(raw, lse, real, x.lo, x.hi, index, prob)
    return made


def _top_by_torch(
    scores: Tensor, lse: Tensor, real: Tensor | None, lo: int, hi: int, index: Tensor, prob: Tensor
) -> None:
    """Fill index and prob (batch, heads, queries, k) from the scores of the columns lo … hi."""
    found = min(index.shape[-1], hi - lo)
    index.fill_(-1)
    prob.zero_()
    value, column = scores[..., lo:hi].topk(found, -1)
    ok = value > float("-inf")
    if real is not None:
        ok &= real[:, None, :, None] != 0
    index[..., :found] = torch.where(ok, column + lo, -1)
    prob[..., :found] = torch.where(ok, torch.exp(value - lse[..., None]), 0)


@_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None, *rest: Any) -> _Outputs:
    lk = k.shape[2] * (1 if pages is None else pages.shape[1])
    keep, topk, scores = rest[8], rest[-4], rest[-3]
    return _outputs(q, v, lk, keep, topk, scores)
