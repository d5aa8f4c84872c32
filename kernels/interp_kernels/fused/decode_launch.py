"""How a decode step is launched: what hangs on types and shapes alone, found once, and what moves
with the length of the cache, found each time.

A `Launch` holds numbers, never a tensor; strides, lengths and pointers are read when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .configs import processors
from .decode_kernels import combine_kernel, split_kernel
from .primitives import (
    INTERPRETED,
    LOG2E,
    dense_kind,
    device_of,
    flags,
    hides,
    loadable,
    padded_dim,
    parts,
    precision,
    strides,
)

#: Keys a tile under the interpreter or, for tests, anywhere; None: what `config` says.
_BLOCK_N: int | None = 32 if INTERPRETED else None
#: A program has at least so many keys.
_MIN_KEYS = 256
#: Above, or with more tiles, top-k is torch's.
_MAX_TOPK, _MAX_TILES = 16, 8192
#: Spans passed to the kernel as numbers; more become labels.
MAX_SPANS = 4


@dataclass(slots=True)
class Decoded:
    """out (batch, heads, queries, d_v) in v's dtype; lse (batch, heads, queries) float32, natural
    log, before the rule (−inf where nothing is visible; includes the sink logit). Where asked:
    scores (batch, heads, queries, keys) float32, the logits after soft-cap, temper and bias, −inf
    where hidden; topk_index (batch, heads, queries, k) int64 columns, strongest first, −1 where
    fewer are visible; topk_prob float32, exp(score − lse); masses (batch, heads, queries, groups)
    float32 before the rule; with scores, factors of that shape, by which the rule multiplies the
    weights of each group."""

    out: Tensor
    lse: Tensor
    scores: Tensor | None = None
    topk_index: Tensor | None = None
    topk_prob: Tensor | None = None
    masses: Tensor | None = None
    factors: Tensor | None = None


@dataclass(slots=True)
class Arguments:
    """What the operator takes. Read, never written: slots are made in a third of a frozen one's
    time."""

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
    dense: Tensor | None
    starts: Tensor | None
    keep_first: int


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


def _cut(tiles: int, block: int, wanted: int, asked: int | None) -> tuple[int, int]:
    """(pieces of the keys, tiles a piece): as many as asked, or wanted and not fewer than
    `_MIN_KEYS` keys each."""
    pieces = asked or min(wanted, max(tiles * block // _MIN_KEYS, 1))
    per_split = max(-(-tiles // pieces), 1)
    return max(-(-tiles // per_split), 1), per_split


class Launch:
    """A decode step of a shape class: the types and shapes of `Arguments` but for the number of
    keys, which of them are given, and its settings but for scale, soft-cap's and window's size,
    spans' edges, offset, lo and hi."""

    def __init__(self, x: Arguments) -> None:
        q, k, v, keep = x.q, x.k, x.v, x.keep
        self.batch, self.heads, self.lq, d = q.shape
        self.n_kv, self.d_v = v.shape[1], v.shape[3]
        self.page = 0 if x.pages is None else k.shape[2]
        self.groups = 1 if keep is None else keep.shape[1]
        self.rows_per_kv = self.heads // self.n_kv * self.lq
        itemsize = max(k.dtype.itemsize, v.dtype.itemsize)
        rows = self.rows_per_kv * self.groups
        block_m, self.block_n, warps, stages = config(max(d, self.d_v), itemsize, rows)
        self.blocks_m = -(-rows // block_m)
        self.topk, self.scores = x.topk, x.scores
        self.keyed = x.scores or x.topk > 0
        # two programs a multiprocessor
        programs = self.batch * self.n_kv * self.blocks_m
        self.wanted = max(2 * processors(q.device.index) // max(programs, 1), 1)
        self._shapes()
        self._fix_split(x, d, block_m, warps, stages)
        self._fix_combine(x)

    def _shapes(self) -> None:
        batch, heads, lq, d_v = self.batch, self.heads, self.lq, self.d_v
        self.row_shape = (batch, heads, lq)
        self.mass_shape = (batch, heads, lq, self.groups)
        self.top_shape = (batch, heads, lq, self.topk)
        # the layout of a model's q, so that its (batch, queries, heads, d_v) view is contiguous
        self.out_shape = (batch, heads, lq, d_v)
        self.out_strides = (lq * heads * d_v, d_v, heads * d_v, 1)

    def _fix_split(self, x: Arguments, d: int, block_m: int, warps: int, stages: int) -> None:
        wide, wide_v = parts(d), parts(self.d_v)
        self.split = {
            "KV": self.n_kv,
            "GROUP": self.heads // self.n_kv,
            "GROUPS": self.groups,
            "BM": block_m,
            "BN": self.block_n,
            "D": d,
            "DP": wide[0],
            "DP2": wide[1],
            "DV": self.d_v,
            "DVP": wide_v[0],
            "DVP2": wide_v[1],
            "PAGE": self.page,
            "CAUSAL": x.causal,
            "WINDOW": x.window is not None,
            "KEPT": x.starts is not None,
            "DENSE": dense_kind(x.dense),
            "DENSE_HIDES": hides(x.dense),
            "KEYS": x.keys is not None,
            "SOFTCAP": x.softcap is not None,
            "TEMPER": x.temper is not None,
            "BIAS": x.bias is not None,
            "HIDES": hides(x.bias),
            "BIAS_HEADS": x.bias is not None and x.bias.shape[1] > 1,
            "LABELS": x.labels is not None,
            "LABEL_HEADS": x.labels is not None and x.labels.shape[1] > 1,
            "SPANS": len(x.spans) // 3,
            "SCORES": self.keyed,
            "STANDS": x.stands is not None,
            "INTERP": INTERPRETED,
            "PRECISION": precision(x.k.dtype),
            "V_PRECISION": precision(x.v.dtype),
            "num_warps": warps,
            "num_stages": stages,
        }

    def _fix_combine(self, x: Arguments) -> None:
        rows, dim_v = self.batch * self.heads * self.lq, padded_dim(self.d_v)
        # few rows: the output's dimensions are shared out, so that the partial sums are read by
        # many programs
        filled = rows >= processors(x.q.device.index) or dim_v < 64
        dim_t = dim_v if filled else max(32, dim_v // 4)
        self.combined = (rows, dim_v // dim_t)
        self.combine = {
            "HEADS": self.heads,
            "GROUP": self.heads // self.n_kv,
            "GROUPS": self.groups,
            "GP": triton.next_power_of_2(self.groups),
            "DV": self.d_v,
            "DVP": dim_v,
            "DT": dim_t,
            "PAGE": self.page,
            "BS": 32 if dim_t <= 128 else 16,
            "SINK": x.sinks is not None,
            "KEYS": x.keys is not None,
            "REAL": x.real is not None,
            "RULE": x.keep is not None,
            "RECEIVE": x.receive is not None,
            "RENORMALISE": x.renormalise,
            "TESTS": 0 if x.tests is None else x.tests.shape[0],
            "WHERE": x.rows is not None,
            "BLEND": x.blend is not None,
            "GAIN": x.gain is not None,
            "FACTORS": x.keep is not None and x.scores,
            "BN": self.block_n,
            "num_warps": 4,
        }

    def run(self, x: Arguments) -> Decoded:
        """What the kernels find for such arguments."""
        q, v = x.q, x.v
        floats, shape = torch.float32, self.row_shape
        made = Decoded(
            v.new_empty_strided(self.out_shape, self.out_strides), q.new_empty(shape, dtype=floats)
        )
        if x.keep is not None:
            made.masses = q.new_empty(self.mass_shape, dtype=floats)
            if self.scores:
                made.factors = q.new_empty(self.mass_shape, dtype=floats)
        if self.topk:
            made.topk_index = q.new_empty(self.top_shape, dtype=torch.int64)
            made.topk_prob = q.new_empty(self.top_shape, dtype=floats)
        lk = x.k.shape[2] if x.pages is None else x.pages.shape[1] * self.page
        first = x.lo // self.block_n
        tiles = -(-(x.hi - first * self.block_n) // self.block_n)
        raw = tops = None
        if self.keyed:
            raw = q.new_empty((*shape, lk), dtype=floats)
            if self.scores:
                made.scores = raw
                if first or x.hi < lk:
                    raw.fill_(float("-inf"))  # columns that no program visits
            tops = q.new_empty((*shape, tiles), dtype=floats)
        if not made.out.numel():
            return made
        in_kernel = self.topk if self.topk <= _MAX_TOPK and tiles <= _MAX_TILES else 0
        self._launch(x, (lk, first, tiles), in_kernel, raw, tops, made)
        if self.topk and not in_kernel:
            assert raw is not None and made.topk_index is not None and made.topk_prob is not None
            _top_by_torch(raw, made.lse, x.real, x.lo, x.hi, made.topk_index, made.topk_prob)
        return made

    def _launch(
        self,
        x: Arguments,
        cut: tuple[int, int, int],
        in_kernel: int,
        raw: Tensor | None,
        tops: Tensor | None,
        made: Decoded,
    ) -> None:
        lk, first, tiles = cut
        q, k, v, lq = x.q, x.k, x.v, self.lq
        splits, per_split = _cut(tiles, self.block_n, self.wanted, x.n_splits)
        state = (*self.mass_shape, splits)
        m, den = q.new_empty(state, dtype=torch.float32), q.new_empty(state, dtype=torch.float32)
        acc = q.new_empty((*state, self.d_v), dtype=torch.float32)
        pages, keys, real, rows = (_whole(t) for t in (x.pages, x.keys, x.real, x.rows))
        keep, receive, tests, bounds = (_whole(t) for t in (x.keep, x.receive, x.tests, x.bounds))
        keys, real, rows = flags(keys), flags(real), flags(rows)
        n_pages = 0 if pages is None else pages.shape[1]
        dense = loadable(x.dense)
        none = made.lse  # a pointer that no kernel reads, for what is not asked
        raw, tops, masses, factors, index, prob = (
            none if t is None else t
            for t in (raw, tops, made.masses, made.factors, made.topk_index, made.topk_prob)
        )
        k_strides, v_strides = k.stride(), v.stride()
        edges = [*x.spans, *_NO_EDGES[len(x.spans) :]]
        with device_of(q):
            split_kernel[(splits, self.batch * self.n_kv, self.blocks_m)](
                q,
                k,
                v,
                pages,
                keys,
                x.bias,
                x.labels,
                x.temper,
                x.stands,
                dense,
                x.starts,
                m,
                den,
                acc,
                raw,
                tops,
                *q.stride(),
                *k_strides,
                *v_strides,
                strides(keys, 2)[0],
                *strides(x.bias, 3),
                *strides(x.labels, 3),
                *strides(x.temper, 3),
                *strides(dense, 4),
                n_pages,
                lq,
                self.rows_per_kv,
                lk,
                x.hi,
                first,
                tiles,
                per_split,
                splits,
                x.offset,
                x.window or 0,
                x.keep_first,
                x.scale * LOG2E,
                (x.softcap or 0.0) * LOG2E,
                *edges,
                enable_fp_fusion=True,
                **self.split,
            )
            combine_kernel[(self.combined[0], self.combined[1] + (in_kernel > 0))](
                m,
                den,
                acc,
                raw,
                tops,
                v,
                pages,
                keys,
                x.sinks,
                real,
                keep,
                receive,
                tests,
                bounds,
                rows,
                x.blend,
                x.gain,
                made.out,
                none,
                masses,
                factors,
                index,
                prob,
                *v_strides,
                *self.out_strides[:3],
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
                SP=_power(splits),
                K=in_kernel,
                KP=_power(in_kernel),
                TILES=_power(tiles),
                enable_fp_fusion=True,
                **self.combine,
            )


_NO_EDGES = (0,) * (3 * MAX_SPANS)


def _power(n: int) -> int:
    """The next power of two, of 1 at least."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def _whole(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


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
