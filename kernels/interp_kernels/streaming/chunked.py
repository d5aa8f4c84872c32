"""The pass over all keys: chunks of query rows, each against the keys it may see, all statistics at
once.

With t = logit − m (m the row maximum) and p = e^t, one product p [V | one-hot labels | 1 | k − q₀]
gives the output, the group masses, l = Σ p and Σ p·(k − q₀); then A = p / l and, for each row,

    lse = m + ln l
    entropy = (lse − m)·Σp/l − Σ p·t / l
    distance = (q − q₀)·Σp/l − Σ p·(k − q₀) / l

(Σp/l < 1 with a sink logit). The centred entropy loses nothing to cancellation and holds for
soft-caps and biases too. An edit's rule multiplies p by factors of the groups' masses before that
product; where it or a blend changes the weights that statistics are asked of, those are computed
from A itself (`chunk_statistics.from_weights`). Edits that do not fuse into one (`compose.fuse`)
change A itself, one after the other. Logits are held in units of ln 2 (log₂ e is part of the
scale): exp2 takes a third of exp's time. Buffers are reused and everything large is in place:
on a CPU this is bound by memory traffic, not by arithmetic.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compose import Steers, fuse
from ..masking import FLOOR, Visibility, compute_dtype
from ..reference import choose_rows, pick
from ..request import Request, Result
from ..steer import Steer
from .chunk_statistics import (
    Chunk,
    from_weights,
    nearness,
    picked,
    receive,
    row_max,
    two_sided_distance,
)
from .prepared_steer import SteerBlock, finish

#: Logits held at a time (elements), small enough to stay in cache; entropy and top-k need a second
#: buffer of this size.
_BUDGET = 1 << 22
#: Query rows a chunk: fewer make products thin, more waste work on the causal diagonal.
_MIN_ROWS, _MAX_ROWS = 64, 128
#: Columns whose maximum is taken together when looking for the argmax.
_ARGMAX_BLOCK = 64
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class _Block:
    """Batch entries b0:b1 and kv heads n0:n1, that is query heads n0·group : n1·group."""

    b0: int
    b1: int
    n0: int
    n1: int
    group: int

    @property
    def bs(self) -> slice:
        return slice(self.b0, self.b1)

    @property
    def ns(self) -> slice:
        return slice(self.n0, self.n1)

    @property
    def hs(self) -> slice:
        return slice(self.n0 * self.group, self.n1 * self.group)


def _plan(batch: int, kv_heads: int, group: int, lq: int, lk: int) -> tuple[list[_Block], int]:
    """Blocks of (batch, kv heads) and rows a chunk such that a chunk's logits fit the budget."""
    per_unit = group * min(_MIN_ROWS, lq) * lk
    units = min(max(1, _BUDGET // per_unit), batch * kv_heads)
    nb, nn = (max(1, units // kv_heads), kv_heads) if units >= kv_heads else (1, units)
    rows = min(
        max(_BUDGET // (nb * nn * group * lk), 1 if units == 1 else _MIN_ROWS), _MAX_ROWS, lq
    )
    blocks = [
        _Block(b, min(b + nb, batch), n, min(n + nn, kv_heads), group)
        for b in range(0, batch, nb)
        for n in range(0, kv_heads, nn)
    ]
    return blocks, rows


def run_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    vis: Visibility,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    request: Request,
    steer: Steers = None,
) -> Result:
    """Output, log-sum-exp and all requested statistics; call it without gradients."""
    steers = fuse(steer, vis.lk, q.device)
    (batch, heads, lq, _), (kv_heads, lk, d_v) = q.shape, (k.shape[1], k.shape[2], v.shape[3])
    dtype = compute_dtype(q, k, v)
    d_v = d_v if request.out else 0
    out = torch.zeros(batch, heads, lq, d_v, dtype=v.dtype, device=q.device)
    lse = torch.full((batch, heads, lq), -torch.inf, dtype=dtype, device=q.device)
    stats = _empty_stats(request, batch, heads, lq, lk, dtype, q.device)
    if lq and lk and batch:
        blocks, rows = _plan(batch, kv_heads, heads // kv_heads, lq, lk)
        spans = [vis.span(r0, min(r0 + rows, lq)) for r0 in range(0, lq, rows)]
        size = (
            max((b.b1 - b.b0) * (b.n1 - b.n0) * b.group for b in blocks)
            * rows
            * max(c1 - c0 for c0, c1 in spans)
        )
        buffers = _Buffers(size, dtype, q.device)
        for block in blocks:
            _run_block(
                block,
                rows,
                q,
                k,
                v,
                vis,
                scale,
                softcap,
                sinks,
                request,
                steers,
                buffers,
                out,
                lse,
                stats,
            )
        for name, question in request.received.items():
            seen = vis.key_counts(question)
            stats[f"received_count:{name}"] = seen
            if question.reduce == "mean":
                stats[f"received:{name}"] /= seen.clamp_min(1)
            stats[f"received:{name}"] = pick(stats[f"received:{name}"], question.keys)
    if request.topk:
        choose_rows(stats, request)
    for one in steers if request.out else ():  # where there are several, blends are done
        out = finish(out, v, vis, one if len(steers) == 1 else Steer(gain=one.gain))
    return Result(out, lse, stats)


def _empty_stats(
    request: Request,
    batch: int,
    heads: int,
    lq: int,
    lk: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """What rows that see nothing report: 0, and −1 for an index."""
    stats: dict[str, Tensor] = {}
    for name in sorted(request.names - {"pair_mass", "argmax", "group_mass"}):
        stats[name] = torch.zeros(batch, heads, lq, dtype=dtype, device=device)
    if "argmax" in request.names:
        stats["argmax"] = torch.full((batch, heads, lq), -1, dtype=torch.int64, device=device)
    if "group_mass" in request.names:
        stats["group_mass"] = torch.zeros(
            batch, heads, lq, request.n_groups, dtype=dtype, device=device
        )
    for name in request.pairs:
        stats[f"pair_mass:{name}"] = torch.zeros(batch, heads, lq, dtype=dtype, device=device)
    for name in request.received:
        stats[f"received:{name}"] = torch.zeros(batch, heads, lk, dtype=dtype, device=device)
        stats[f"received_count:{name}"] = torch.zeros(
            batch, 1, lk, dtype=torch.int64, device=device
        )
    if request.topk:
        stats["topk_index"] = torch.full(
            (batch, heads, lq, request.topk), -1, dtype=torch.int64, device=device
        )
        stats["topk_prob"] = torch.zeros(batch, heads, lq, request.topk, dtype=dtype, device=device)
    return stats


class _Buffers:
    """Named scratch tensors of `size` elements, handed out as views. On a CPU those that fit the
    budget are kept for the thread's next call: the first touch of fresh memory costs as much as the
    arithmetic done in it."""

    _kept = threading.local()

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self.store: dict[tuple[str, torch.dtype], Tensor] = {}
        if device.type == "cpu" and size <= _BUDGET:
            self.store = self._kept.__dict__.setdefault("store", self.store)

    def get(self, name: str, *shape: int) -> Tensor:
        key = (name, self.dtype)
        buffer = self.store.get(key)
        if buffer is None or buffer.numel() < self.size:
            # A tensor born in inference mode could not be written to outside it.
            with torch.inference_mode(False):
                buffer = torch.empty(self.size, dtype=self.dtype, device=self.device)
            if type(buffer) is Tensor:  # not a fake one of some tracing mode
                self.store[key] = buffer
        return buffer[: int(torch.Size(shape).numel())].view(shape)


def _values(block: _Block, v: Tensor, request: Request, dtype: torch.dtype) -> Tensor:
    """(batch · kv_heads, keys, width): [V | one-hot labels | 1 | k − q₀ (written a chunk) | 0 …], a
    multiple of 16 columns, which the matrix product likes; without V where no output is wanted."""
    value = v[block.bs, block.ns, :, : v.shape[3] if request.out else 0].to(dtype)
    nb, nn, lk, d_v = value.shape
    groups = request.n_groups if "group_mass" in request.names else 0
    width = -(-(d_v + groups + 2) // 16) * 16
    columns = torch.zeros(nb, nn, lk, width, dtype=dtype, device=v.device)
    columns[..., :d_v] = value
    if groups:
        assert request.labels is not None
        labels = request.labels.to(v.device)[block.bs, None, :, None]
        columns[..., d_v : d_v + groups] = labels == torch.arange(groups, device=v.device)
    columns[..., d_v + groups] = 1.0
    return columns.reshape(nb * nn, lk, width)


def _run_block(
    block: _Block,
    rows: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vis: Visibility,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    request: Request,
    steers: tuple[Steer, ...],
    buffers: _Buffers,
    out: Tensor,
    lse: Tensor,
    stats: dict[str, Tensor],
) -> None:
    dtype, names, bs, hs = buffers.dtype, request.names, block.bs, block.hs
    keys_t = k[bs, block.ns].to(dtype).flatten(0, 1).transpose(1, 2)
    values = _values(block, v, request, dtype)
    nb, nn, group, d, d_v = (
        block.b1 - block.b0,
        block.n1 - block.n0,
        block.group,
        q.shape[3],
        out.shape[3],
    )
    heads, groups = nn * group, request.n_groups if "group_mass" in names else 0
    # σ is of natural logits, and a dense bias comes in natural units.
    natural = any(one.sigmoid is not None for one in steers) or (
        vis.mask.dense is not None and vis.mask.dense.dtype != torch.bool
    )
    unit, power = (1.0, torch.exp) if natural else (_LOG2E, torch.exp2)
    sink = None if sinks is None else sinks[hs].to(dtype)[None, :, None] * unit
    two_sided = not vis.mask.causal
    edits = [SteerBlock(steer, vis, bs, hs, dtype, unit) for steer in steers]
    edit = edits[0] if edits else None  # the one with temper and bias
    several = len(edits) > 1
    rule = edit is not None and bool(edit.rules) and not several
    final = (
        edit is not None and edit.reweighs and (several or bool(request))
    )  # statistics are of p·factors, blended
    alone = (
        not d_v and not groups and not rule and not several and "distance" not in names
    )  # Σ p is all one needs
    keep_t = not final and (
        "entropy" in names or request.topk or ("distance" in names and two_sided)
    )
    real = vis.row_set()[bs]
    row_sets = {
        name: vis.row_set(question.queries)[bs] for name, question in request.received.items()
    }

    for r0 in range(0, vis.lq, rows):
        r1 = min(r0 + rows, vis.lq)
        c0, c1 = vis.span(r0, r1)
        n, width = r1 - r0, c1 - c0
        if not width:
            continue
        # Query heads of a kv head stand side by side as rows: keys are never repeated.
        queries = q[bs, hs, r0:r1].to(dtype) * (scale * unit if softcap is None else scale)
        queries = queries.reshape(nb * nn, group * n, d)
        t = torch.bmm(queries, keys_t[:, :, c0:c1], out=buffers.get("t", nb * nn, group * n, width))
        t = t.view(nb, heads, n, width)
        if softcap is not None:
            t.mul_(1 / softcap).tanh_().mul_(softcap * unit)
        if edit is not None:
            edit.logits(t, r0, r1, c0, c1, in_place=True)
        vis.hide_(t, bs, hs, r0, r1, c0, c1)
        if edit is not None and edit.sigmoid is not None:
            p = t.add_(edit.sigmoid).sigmoid_()
            sums = torch.bmm(p.view(nb * nn, group * n, width), values[:, c0:c1]).view(
                nb, heads, n, -1
            )
            out[bs, hs, r0:r1] = sums[..., :d_v]
            lse[bs, hs, r0:r1] = sums[..., d_v].log()
            continue
        top, best = row_max(t, "argmax" in names and not final, _ARGMAX_BLOCK)
        empty = top <= FLOOR
        shift = top.clamp_min(FLOOR) if sink is None else torch.maximum(top, sink)
        t.sub_(shift[..., None])
        p = power(t, out=buffers.get("p", nb, heads, n, width) if keep_t else t)

        if rule:
            assert edit is not None
            masses = edit.masses(p, c0, c1)
            mass = masses.sum(-1)
            extra = torch.zeros_like(mass) if sink is None else power(sink - shift)
            total = mass + extra
            per = torch.where(empty, 0.0, 1.0 / total)[..., None]
            factor = edit.factors(masses * per, extra[..., None] * per, r0, r1)
            edit.scale_(p, factor, c0, c1, buffers.get("p", nb, heads, n, width))
        if several:
            mass = p.sum(-1)
            extra = torch.zeros_like(mass) if sink is None else power(sink - shift)
            total = mass + extra
            per = torch.where(empty, 0.0, 1.0 / total)[..., None]
            p.mul_(per)
            share = extra[..., None] * per
            for one in edits:
                share = one.edited_(p, share, r0, r1, c0, c1, buffers.get("p", nb, heads, n, width))
        if "distance" in names and not two_sided:
            values[:, c0:c1, d_v + groups + 1] = (vis.k_slots(c0, c1) - (vis.mask.q_start + r0)).to(
                dtype
            )
        if alone:
            sums, mass = p.new_empty(nb, heads, n, 0), p.sum(-1)
        else:
            sums = torch.bmm(p.view(nb * nn, group * n, width), values[:, c0:c1]).view(
                nb, heads, n, -1
            )
            mass = mass if rule or several else sums[..., d_v + groups]
        if not rule and not several:
            total = mass if sink is None else mass + power(sink - shift)
        inverse = torch.where(empty, 0.0, 1.0 / total)
        out[bs, hs, r0:r1] = sums[..., :d_v] if several else sums[..., :d_v] * inverse[..., None]
        lse[bs, hs, r0:r1] = torch.where(empty, -torch.inf, shift / unit + total.log())

        # From here on: statistics, 0 for rows that are padding.
        counted, at = real[:, None, r0:r1], Chunk(bs, hs, r0, r1, c0, c1)
        if final:
            assert edit is not None
            if several and not request:
                continue
            if not several:
                p.mul_(inverse[..., None])
                edit.blend_(p, r0, r1, c0, c1)
            shown = edit.shown(p, bs, hs, r0, r1, c0, c1)
            from_weights(
                p,
                shown,
                counted,
                values[:, c0:c1, d_v : d_v + groups],
                row_sets,
                request,
                vis,
                at,
                stats,
            )
            continue
        inverse = inverse * counted
        share = mass * inverse
        if groups:
            stats["group_mass"][bs, hs, r0:r1] = sums[..., d_v : d_v + groups] * inverse[..., None]
        if best is not None:
            stats["argmax"][bs, hs, r0:r1] = (best + c0).masked_fill_(empty | ~counted, -1)
        if "max" in names:
            stats["max"][bs, hs, r0:r1] = power(top - shift) * inverse
        if request.topk:
            prob, index = t.topk(min(request.topk, width), dim=-1)
            hidden = (prob <= FLOOR) | ~counted[..., None]
            stats["topk_index"][bs, hs, r0:r1, : index.shape[-1]] = (index + c0).masked_fill_(
                hidden, -1
            )
            stats["topk_prob"][bs, hs, r0:r1, : index.shape[-1]] = power(prob) * inverse[..., None]
        if "entropy" in names:
            # ln(total) = lse − m; t is not needed any more, so the product goes into it.
            product = t.mul_(p).sum(-1)
            stats["entropy"][bs, hs, r0:r1] = torch.where(
                empty, 0.0, total.log() * share
            ) - product * (inverse / unit)
        if "distance" in names:
            stats["distance"][bs, hs, r0:r1] = (
                two_sided_distance(p, t, vis, at) * inverse
                if two_sided
                else torch.arange(n, device=q.device) * share
                - sums[..., d_v + groups + 1] * inverse
            )
        if "capped_distance" in names:
            near = nearness(p, vis, request.cap, at)
            stats["capped_distance"][bs, hs, r0:r1] = request.cap * share - near * inverse
        for name, index in request.pairs.items():
            stats[f"pair_mass:{name}"][bs, hs, r0:r1] = picked(p, index, at) * inverse
        receive(p, inverse, row_sets, request, vis, at, stats)
