"""Statistics of a few rows from their raw scores, which are O(keys): entropy, maximum and argmax in
one launch, others by their definitions in PyTorch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..call import Call
from ..masking import FLOOR
from .decode_launch import MAX_SPANS, Decoded
from .primitives import device_of, strides

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
#: What the kernel knows.
_FEW = frozenset({"entropy", "max", "argmax"})
#: Keys a tile.
_TILE = 1024


@triton.jit(do_not_specialize=["lo", "hi", "lk", "label_b", "label_h", "label_n"])
def decode_statistics_kernel(  # noqa: PLR0913
    score_ptr, lse_ptr, factor_ptr, label_ptr, entropy_ptr, max_ptr, index_ptr,
    label_b, label_h, label_n, lq, lk, lo, hi,
    a0, b0, g0, a1, b1, g1, a2, b2, g2, a3, b3, g3,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, LABELS: tl.constexpr, SPANS: tl.constexpr,
    ENTROPY: tl.constexpr, LARGEST: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """−Σ A ln A, max A and its lowest column of one row (batch, heads, queries), where A =
    exp(score − lse)·factor of the key's group; column −1 where every score is −inf. NaN anywhere is
    NaN."""
    row = tl.program_id(0).to(tl.int64)
    head = row // lq % HEADS
    batch = row // lq // HEADS
    offs = tl.arange(0, BN)
    lse = tl.load(lse_ptr + row)
    base = tl.where(lse < -1e29, -1e29, lse)  # −inf − (−inf) is no weight; NaN stays
    entropy = 0.0
    best = -1.0
    index = -1
    broken = 0.0
    for start in tl.range(lo, hi, BN):
        cols = start + offs
        s = tl.load(score_ptr + row * lk + cols, mask=cols < hi, other=float("-inf"))
        a = tl.exp2((s - base) * _LOG2E)
        if GROUPS > 0:
            label = tl.zeros([BN], tl.int32)
            if LABELS:
                label = tl.load(
                    label_ptr + batch * label_b + head * label_h + cols * label_n,
                    mask=cols < hi,
                    other=0,
                ).to(tl.int32)
            if SPANS > 0:
                label = tl.where((cols >= a0) & (cols < b0), g0, label)
            if SPANS > 1:
                label = tl.where((cols >= a1) & (cols < b1), g1, label)
            if SPANS > 2:
                label = tl.where((cols >= a2) & (cols < b2), g2, label)
            if SPANS > 3:
                label = tl.where((cols >= a3) & (cols < b3), g3, label)
            factor = tl.zeros([BN], tl.float32)
            for g in tl.static_range(GROUPS):
                one = tl.load(factor_ptr + row * GROUPS + g)
                factor = tl.where(label == g, one, factor)
            a = a * factor
        broken += tl.sum(tl.where(a < float("inf"), 0.0, 1.0), 0)
        if ENTROPY:
            some = a > 0.0
            log = tl.log2(tl.where(some, a, 1.0)) * _LN2
            entropy -= tl.sum(tl.where(some, a * log, 0.0), 0)
        if LARGEST:
            shown = tl.where(s > float("-inf"), a, -1.0)
            here = tl.max(shown, 0)
            first = tl.min(tl.where(shown == here, cols, 0x7FFFFFFF), 0)
            index = tl.where(here > best, first, index)
            best = tl.maximum(here, best)
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(broken > 0.0, float("nan"), entropy))
    if LARGEST:
        best = tl.maximum(best, 0.0)
        tl.store(max_ptr + row, tl.where(broken > 0.0, float("nan"), best))
        tl.store(index_ptr + row, index)


def statistics(call: Call, got: Decoded) -> dict[str, Tensor]:
    """What is asked, of the weights as the rule leaves them; as `reference.statistics`."""
    request, vis, scores = call.request, call.vis, got.scores
    assert scores is not None
    asks_more = request.pairs or request.received or request.topk or not request.names <= _FEW
    real = type(scores) is Tensor and not torch.compiler.is_compiling()
    if real and vis.rows is None and not asks_more:
        return _few(call, scores, got.lse, got.factors)
    every = slice(None)
    a = scores.sub(got.lse.clamp_min(FLOOR)[..., None]).exp_()
    if got.factors is not None:
        labels = call.steer.labels_of(vis.lk, a.device)[:, :, None].expand(a.shape)
        a = a * got.factors.gather(-1, labels)
    visible = vis.visible(every, every, 0, vis.lq, 0, vis.lk).expand(a.shape)
    return reference.statistics(a, visible, vis, request, scores > -torch.inf)


def _few(call: Call, scores: Tensor, lse: Tensor, factors: Tensor | None) -> dict[str, Tensor]:
    names, steer, (batch, heads, lq, lk) = call.request.names, call.steer, scores.shape
    stats: dict[str, Tensor] = {}
    if "entropy" in names:
        stats["entropy"] = torch.empty_like(lse)
    largest = "max" in names or "argmax" in names
    most = torch.empty_like(lse) if largest else lse
    index = lse.new_empty((batch, heads, lq), dtype=torch.int64) if largest else lse
    if "max" in names:
        stats["max"] = most
    if "argmax" in names:
        stats["argmax"] = index
    labels, spans = None, steer.spans
    if factors is not None and (steer.labels is not None or len(spans) > MAX_SPANS):
        labels, spans = steer.labels_of(lk, lse.device), ()
    edges = [x for span in spans for x in span] + [0] * (3 * (MAX_SPANS - len(spans)))
    lo, hi = call.vis.span(0, lq)
    with device_of(lse):
        decode_statistics_kernel[(batch * heads * lq,)](
            scores,
            lse,
            lse if factors is None else factors,
            labels,
            stats.get("entropy", lse),
            most,
            index,
            *strides(labels, 3),
            lq,
            lk,
            lo,
            hi,
            *edges,
            HEADS=heads,
            GROUPS=0 if factors is None else factors.shape[-1],
            LABELS=labels is not None,
            SPANS=len(spans),
            ENTROPY="entropy" in names,
            LARGEST=largest,
            BN=_TILE,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return stats
