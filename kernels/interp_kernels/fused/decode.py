"""Attention of few query rows over a long cache: split over the keys, with edits, raw scores and
exact top-k keys.

Decode is bound by reading the cache, so everything else rides along: a rule's groups are further
rows of the same tile, raw scores add 4 bytes a (head, key), the strongest keys come from the tiles'
maxima.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from .decode_launch import MAX_SPANS, Arguments, Decoded, Launch
from .primitives import DTYPES, MAX_DIM, MAX_GROUPS, schema


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
    x = arguments(call, topk=topk, scores=scores, pages=pages, stands=stands, n_splits=n_splits)
    out, lse, raw, index, prob, masses, factors = _decode(*(getattr(x, name) for name in _NAMES))
    return Decoded(
        out,
        lse,
        raw if scores else None,
        index if topk else None,
        prob if topk else None,
        None if x.keep is None else masses,
        factors if scores and x.keep is not None else None,
    )


def arguments(
    call: Call,
    *,
    topk: int = 0,
    scores: bool = False,
    pages: Tensor | None = None,
    stands: Tensor | None = None,
    n_splits: int | None = None,
) -> Arguments:
    """What `decode` hands the operator, its tensors on the queries' device; nothing is checked."""
    q, vis, mask, steer, device = call.q, call.vis, call.vis.mask, call.steer, call.q.device
    lo, hi = vis.span(0, vis.lq) if stands is None else (0, vis.lk)
    labels, spans = steer.labels, [x for span in steer.spans for x in span]
    if len(steer.spans) > MAX_SPANS:
        labels, spans = steer.labels_of(vis.lk, device).to(torch.uint8), []

    def here(value: Tensor | None) -> Tensor | None:
        return value if value is None or value.device == device else value.to(device)

    keep = receive = tests = bounds = rows = None
    renormalise = False
    if steer.rule is not None:
        rule = steer.rules[0]
        keep, receive, rows = here(rule.keep), here(rule.receive), here(rule.rows)
        tests, bounds, renormalise = here(rule.tests), here(rule.bounds), rule.renormalise
    return Arguments(
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
        keep,
        receive,
        tests,
        bounds,
        rows,
        renormalise,
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
        None if stands is None else stands.to(device, torch.int32),
        here(mask.dense),
        vis.kept_from,
        vis.keep_first,
    )


def _check(call: Call, pages: Tensor | None, stands: Tensor | None) -> None:
    """Raise `ValueError` for what these kernels do not know."""
    q, k, v, vis, steer = call.q, call.k, call.v, call.vis, call.steer
    if call.mask.dense is not None and steer.blend is not None:
        raise ValueError("decode knows no blend under a dense mask; the forward does.")
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


#: In the operator's order.
_NAMES = tuple(one.name for one in fields(Arguments))
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _outputs(
    q: Tensor, v: Tensor, lk: int, keep: Tensor | None, topk: int, scores: bool
) -> _Outputs:
    batch, heads, lq, _ = q.shape
    masses = (0,) if keep is None else (batch, heads, lq, keep.shape[1])
    return (
        # the layout of a model's q, so that its (batch, queries, heads, d_v) view is contiguous
        v.new_empty(batch, lq, heads, v.shape[3]).transpose(1, 2),
        q.new_empty(batch, heads, lq, dtype=torch.float32),
        q.new_empty((batch, heads, lq, lk) if scores else (0,), dtype=torch.float32),
        q.new_empty((batch, heads, lq, topk) if topk else (0,), dtype=torch.int64),
        q.new_empty((batch, heads, lq, topk) if topk else (0,), dtype=torch.float32),
        q.new_empty(masses, dtype=torch.float32),
        q.new_empty(masses if scores else (0,), dtype=torch.float32),
    )


@torch.library.custom_op(
    "interp::decode",
    mutates_args=(),
    schema=schema(Arguments, "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"),
)
def _decode(*values: Any) -> _Outputs:
    x = Arguments(*values)
    got = Launch(x).run(x)

    def or_empty(value: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.q.new_empty(0, dtype=dtype) if value is None else value

    return (
        got.out,
        got.lse,
        or_empty(got.scores),
        or_empty(got.topk_index, torch.int64),
        or_empty(got.topk_prob),
        or_empty(got.masses),
        or_empty(got.factors),
    )


@_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None, *rest: Any) -> _Outputs:
    lk = k.shape[2] * (1 if pages is None else pages.shape[1])
    keep, topk, scores = rest[8], rest[-7], rest[-6]
    return _outputs(q, v, lk, keep, topk, scores)
