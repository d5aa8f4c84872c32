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

from ..call import Call
from ..looking import lazy, may_look
from ..masking import FLOOR, cast
from ..reference import choose_rows, pick
from ..request import Result
from ..steer import Steer
from .chunk_plan import (
    Block,
    Sizes,
    blocks_of,
    chunks_of,
    cut_to,
    device_sizes,
    rows_wanted,
)
from .chunk_statistics import (
    Chunk,
    Results,
    Wanted,
    from_weights,
    hidden,
    nearness,
    picked,
    receive,
    row_max,
    two_sided_distance,
)
from .prepared_steer import SteerBlock, finish

#: Σ p times each column of `_BlockPass.values`; Σ p; 1 / (Σ p with the sink logit's share); its ln.
_Sums = tuple[Tensor, Tensor, Tensor, Tensor]

#: Logits held at a time (elements), small enough to stay in cache; entropy and top-k need a second
#: buffer of this size.
_BUDGET = 1 << 22
#: Up to so many elements a buffer is not worth keeping.
_SMALL = 1 << 14
#: Query rows a chunk: fewer make products thin, more waste work on the causal diagonal.
_MIN_ROWS, _MAX_ROWS = 64, 128
#: Columns whose maximum is taken together when looking for the argmax.
_ARGMAX_BLOCK = 64
_LOG2E = math.log2(math.e)


def _sizes(call: Call) -> Sizes:
    """How much a chunk holds at a time, by the device of the tensors."""
    if call.q.is_cpu:
        return Sizes(_BUDGET, _MIN_ROWS, _MAX_ROWS)
    names, request, edits = call.request.names, call.request, call.steers
    buffers = 1  # the logits; beside them the weights, and copies of these where rules changed them
    if edits and (len(edits) > 1 or edits[0].rules or edits[0].blend is not None):
        buffers = 4 if request else 2
    elif "entropy" in names or "distance" in names or request.topk:
        buffers = 2
    dense = call.mask.dense
    if dense is not None and dense.dtype != torch.bool:
        buffers += 1
    return device_sizes(call.vis.lq, call.dtype, buffers)


def run_chunks(call: Call) -> Result:
    """Output, log-sum-exp and all requested statistics; call it without gradients."""
    vis, request, kv_heads = call.vis, call.request, call.k.shape[1]
    blocks: list[Block] = []
    chunks: list[tuple[int, int, int, int]] = []
    if vis.lq and vis.lk and vis.batch:
        sizes = _sizes(call)
        blocks, rows = blocks_of(vis, kv_heads, sizes)
        chunks = list(chunks_of(vis, blocks[0].heads, rows, sizes))
        wanted = rows_wanted(call)
        chunks = chunks if wanted is None else cut_to(wanted, vis, chunks)
    whole = len(blocks) == len(chunks) == 1 and chunks[0][2] < chunks[0][3]
    results = Results(call, whole and chunks[0][:2] == (0, vis.lq))
    if chunks:
        size = blocks[0].heads * max((r1 - r0) * (c1 - c0) for r0, r1, c0, c1 in chunks)
        buffers = _Buffers(size, call.dtype, call.q.device)
        for block in blocks:
            one = _BlockPass(call, block, buffers, results)
            for r0, r1, c0, c1 in chunks:
                if c0 < c1:
                    one.run(Chunk(block.bs, block.hs, r0, r1, c0, c1))
    if blocks:
        _finish_received(results)
    stats = results.statistics()
    if request.topk:
        choose_rows(stats, request)
    out = results.values["out"]
    for steer in call.steers if request.out else ():  # where there are several, blends are done
        alone = len(call.steers) == 1
        out = finish(out, call.v, vis, steer if alone else Steer(gain=steer.gain))
    return Result(out, results.values["lse"], stats)


def _finish_received(results: Results) -> None:
    """Means of what the columns received, of the keys that were asked for."""
    values = results.values
    for name, question in results.call.request.received.items():
        seen = results.call.vis.key_counts(question)
        values[f"received_count:{name}"] = seen
        if question.reduce == "mean":
            values[f"received:{name}"] /= seen.clamp_min(1)
        values[f"received:{name}"] = pick(values[f"received:{name}"], question.keys)


class _Buffers:
    """Named scratch tensors of `size` elements, handed out as views. On a CPU those that fit the
    budget are kept for the thread's next call: the first touch of fresh memory costs as much as the
    arithmetic done in it."""

    _kept = threading.local()

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self.store: dict[tuple[str, torch.dtype], Tensor] = {}
        if may_look(device) and size <= _BUDGET:
            self.store = self._kept.__dict__.setdefault("store", self.store)

    def large(self, name: str, *shape: int) -> Tensor | None:
        """The same, None where a fresh tensor costs less than a view of a kept one."""
        return self.get(name, *shape) if self.size > _SMALL else None

    def get(self, name: str, *shape: int) -> Tensor:
        key = (name, self.dtype)
        buffer = self.store.get(key)
        if buffer is None or buffer.numel() < self.size:
            # A tensor born in inference mode could not be written to outside it.
            with torch.inference_mode(False):
                buffer = torch.empty(self.size, dtype=self.dtype, device=self.device)
            if type(buffer) is Tensor:  # not a fake one of some tracing mode
                self.store[key] = buffer
        return buffer[: math.prod(shape)].view(shape)


@dataclass
class _Weighed:
    """A chunk's rows after the softmax: p = e^t (batch, heads, rows, columns); t, the logits less
    `shift`, where they are still needed; per row: the largest logit `top` and its column, whether
    there is none (`empty`), and the shift."""

    p: Tensor
    t: Tensor
    top: Tensor
    best: Tensor | None
    empty: Tensor
    shift: Tensor


class _BlockPass:
    """One block of batch entries and heads: keys and values as the products want them, the edits
    made ready, and which steps the request needs."""

    def __init__(self, call: Call, block: Block, buffers: _Buffers, results: Results) -> None:
        self.call, self.buffers, self.results = call, buffers, results
        vis, names, bs, hs = call.vis, call.request.names, block.bs, block.hs
        self.names, self.dtype = names, buffers.dtype
        #: (batch entries, kv heads, query heads a kv head) of the block; all there are?
        self.sizes = block.b1 - block.b0, block.n1 - block.n0, block.group
        self.all_heads = self.sizes[:2] == call.k.shape[:2]
        k, v = call.k, call.v
        if not self.all_heads:
            k, v = k[bs, block.ns], v[bs, block.ns]
        self.keys_t = cast(k, self.dtype).flatten(0, 1).transpose(1, 2)
        self.d_v = v.shape[3] if call.request.out else 0
        self.groups = call.request.n_groups if "group_mass" in names else 0
        self.values = self._columns(v, bs)
        self._set_units()
        self.sink = None if call.sinks is None else call.sinks[hs].to(self.dtype)[None, :, None]
        if self.sink is not None:
            self.sink = self.sink * self.unit
        self._set_edits(bs, hs)
        self.rows_real = None if vis.rows is None else vis.rows[bs]
        self.bs = bs

    @lazy
    def wanted(self) -> Wanted:
        """What statistics that are not sums of the products are computed from."""
        request, vis = self.call.request, self.call.vis
        sets = {
            name: vis.row_set(question.queries)[self.bs]
            for name, question in request.received.items()
        }
        onehot = self.values.narrow(-1, self.d_v, self.groups)
        return Wanted(request, vis, sets, onehot, self.results)

    def _columns(self, v: Tensor, bs: slice) -> Tensor:
        """(batch · kv_heads, keys, width): [V | one-hot labels | 1 | k − q₀ (written a chunk) | 0
        …], a multiple of 16 columns, which the matrix product likes; without V where no output is
        wanted."""
        nb, nn, lk, _ = v.shape
        width = -(-(self.d_v + self.groups + 2) // 16) * 16
        own = v.narrow(-1, 0, self.d_v) if self.d_v < v.shape[3] else v
        columns = torch.nn.functional.pad(cast(own, self.dtype), (0, width - self.d_v))
        if self.groups:
            assert self.call.request.labels is not None
            labels = self.call.request.labels.to(v.device)[bs, None, :, None]
            columns[..., self.d_v : self.d_v + self.groups] = labels == torch.arange(
                self.groups, device=v.device
            )
        columns.select(-1, self.d_v + self.groups).fill_(1.0)
        return columns.view(nb * nn, lk, width)

    def _set_units(self) -> None:
        """σ is of natural logits, and a dense bias comes in natural units."""
        dense = self.call.mask.dense
        natural = any(one.sigmoid is not None for one in self.call.steers) or (
            dense is not None and dense.dtype != torch.bool
        )
        self.unit, self.power = (1.0, torch.exp) if natural else (_LOG2E, torch.exp2)

    def _set_edits(self, bs: slice, hs: slice) -> None:
        """The edits for these heads, and which passes over the weights they and the request
        take."""
        call, names, request = self.call, self.names, self.call.request
        self.edits = [
            SteerBlock(steer, call.vis, bs, hs, self.dtype, self.unit) for steer in call.steers
        ]
        self.edit = edit = self.edits[0] if self.edits else None  # the one with temper and bias
        self.several = len(self.edits) > 1
        self.rule = edit is not None and bool(edit.rules) and not self.several
        # statistics are of p·factors, blended
        self.final = edit is not None and edit.reweighs and (self.several or bool(request))
        edited = self.rule or self.several
        # Σ p is all one needs
        self.alone = not self.d_v and not self.groups and not edited and "distance" not in names
        self.two_sided = not call.mask.causal
        self.keep_t = not self.final and bool(
            "entropy" in names or request.topk or ("distance" in names and self.two_sided)
        )

    def run(self, at: Chunk) -> None:
        """The chunk's rows: output, log-sum-exp and statistics into the results."""
        t = self._logits(at)
        if self.edit is not None and self.edit.sigmoid is not None:
            return self._sigmoid(t, self.edit.sigmoid, at)
        row = self._softmax(t)
        mass: Tensor | None = None
        total: Tensor | None = None
        if self.rule:
            mass, total = self._apply_rule(row, at)
        elif self.several:
            mass, total = self._apply_edits(row, at)
        if "distance" in self.names and not self.two_sided:
            slots = self.call.vis.k_slots(at.c0, at.c1) - (self.call.mask.q_start + at.r0)
            self.values[:, at.c0 : at.c1, self.d_v + self.groups + 1] = slots.to(self.dtype)
        if self.alone:
            sums, mass = row.p.new_empty(*row.p.shape[:3], 0), row.p.sum(-1)
        else:
            sums = self._products(row.p, at)
            if mass is None:  # contiguous: a logarithm of strided numbers is a slow one
                mass = sums.select(-1, self.d_v + self.groups).contiguous()
        if total is None:
            total = mass if self.sink is None else mass + self.power(self.sink - row.shift)
        inverse = total.reciprocal().masked_fill_(row.empty, 0.0)
        log_total = total.log()
        out = sums.narrow(-1, 0, self.d_v)
        out = out.clone() if self.several else out * inverse.unsqueeze(-1)
        self.results.put("out", out, at)
        lse = (row.shift / self.unit + log_total).masked_fill_(row.empty, -torch.inf)
        self.results.put("lse", lse, at)
        if self.final:
            self._edited_statistics(row, inverse, at)
        elif self.call.request:
            self._statistics(row, (sums, mass, inverse, log_total), at)

    def _cut(self, x: Tensor, at: Chunk) -> Tensor:
        """The chunk's heads and rows of (batch, heads, queries, …)."""
        return x if self.results.whole else x[at.bs, at.hs, at.r0 : at.r1]

    def _logits(self, at: Chunk) -> Tensor:
        """(batch, heads, rows, columns) in units of `self.unit`, edited, in the buffer "t"."""
        call, softcap, unit = self.call, self.call.softcap, self.unit
        (nb, nn, group), n, width = self.sizes, at.r1 - at.r0, at.c1 - at.c0
        # Query heads of a kv head stand side by side as rows: keys are never repeated.
        queries = cast(self._cut(call.q, at), self.dtype)
        queries = queries * (call.scale * unit if softcap is None else call.scale)
        queries = queries.reshape(nb * nn, group * n, call.q.shape[3])
        keys_t = self.keys_t if width == call.vis.lk else self.keys_t[:, :, at.c0 : at.c1]
        out = self.buffers.large("t", nb * nn, group * n, width)
        t = torch.bmm(queries, keys_t, out=out).view(nb, nn * group, n, width)
        if softcap is not None:
            t.mul_(1 / softcap).tanh_().mul_(softcap * unit)
        if self.edit is not None:
            self.edit.logits(t, at.r0, at.r1, at.c0, at.c1, in_place=True)
        call.vis.hide_(t, at.bs, at.hs, at.r0, at.r1, at.c0, at.c1)
        return t

    def _sigmoid(self, t: Tensor, offset: float, at: Chunk) -> None:
        sums = self._products(t.add_(offset).sigmoid_(), at)
        self.results.put("out", sums[..., : self.d_v].clone(), at)
        self.results.put("lse", sums[..., self.d_v].log(), at)

    def _softmax(self, t: Tensor) -> _Weighed:
        """Weights less their normalisation, over t or beside it."""
        top, best = row_max(t, "argmax" in self.names and not self.final, _ARGMAX_BLOCK)
        shift = top.clamp_min(FLOOR)
        if self.sink is not None:
            shift = torch.maximum(top, self.sink)
        t.sub_(shift.unsqueeze(-1))
        p = self.power(t, out=self.buffers.large("p", *t.shape) if self.keep_t else t)
        return _Weighed(p, t, top, best, top <= FLOOR, shift)

    def _products(self, p: Tensor, at: Chunk) -> Tensor:
        """(batch, heads, rows, width): p times the columns of `values`."""
        nb, heads, n, width = p.shape
        nn, group = self.sizes[1:]
        values = self.values
        if width != values.shape[1]:
            values = values[:, at.c0 : at.c1]
        return torch.bmm(p.view(nb * nn, group * n, width), values).view(nb, heads, n, -1)

    def _normaliser(self, row: _Weighed, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Σ p with the sink logit's share; that share; and the factor to weights, 0 in rows that
        see nothing, (batch, heads, rows, 1)."""
        if self.sink is None:
            extra = torch.zeros_like(mass)
        else:
            extra = self.power(self.sink - row.shift)
        total = mass + extra
        return total, extra, total.reciprocal().masked_fill_(row.empty, 0.0).unsqueeze(-1)

    def _apply_rule(self, row: _Weighed, at: Chunk) -> tuple[Tensor, Tensor]:
        """p times the rule's factors; Σ p before, without and with the sink logit's share."""
        assert self.edit is not None
        masses = self.edit.masses(row.p, at.c0, at.c1)
        mass = masses.sum(-1)
        total, extra, per = self._normaliser(row, mass)
        factor = self.edit.factors(masses * per, extra.unsqueeze(-1) * per, at.r0, at.r1)
        scratch = self.buffers.get("p", *row.p.shape)
        self.edit.scale_(row.p, factor, at.c0, at.c1, scratch)
        return mass, total

    def _apply_edits(self, row: _Weighed, at: Chunk) -> tuple[Tensor, Tensor]:
        """p becomes the weights after all edits; Σ p before them as in `_apply_rule`."""
        mass = row.p.sum(-1)
        total, extra, per = self._normaliser(row, mass)
        row.p.mul_(per)
        share = extra.unsqueeze(-1) * per
        for one in self.edits:
            scratch = self.buffers.get("p", *row.p.shape)
            share = one.edited_(row.p, share, at.r0, at.r1, at.c0, at.c1, scratch)
        return mass, total

    def _counted(self, at: Chunk) -> Tensor | None:
        """(batch, 1, rows) bool: rows that are not padding, whose statistics are not 0; None for
        all."""
        return None if self.rows_real is None else self.rows_real[:, None, at.r0 : at.r1]

    def _edited_statistics(self, row: _Weighed, inverse: Tensor, at: Chunk) -> None:
        """Statistics of weights that are no softmax any more."""
        assert self.edit is not None
        if self.several and not self.call.request:
            return
        if not self.several:
            row.p.mul_(inverse.unsqueeze(-1))
            self.edit.blend_(row.p, at.r0, at.r1, at.c0, at.c1)
        shown = self.edit.shown(row.p, at.bs, at.hs, at.r0, at.r1, at.c0, at.c1)
        from_weights(row.p, shown, self._counted(at), self.wanted, at)

    def _statistics(self, row: _Weighed, sums: _Sums, at: Chunk) -> None:
        """Statistics of a softmax, as the head of this file has them."""
        request, names, put, d_v = self.call.request, self.names, self.results.put, self.d_v
        products, mass, inverse, log_total = sums
        counted = self._counted(at)
        inverse = inverse if counted is None else inverse * counted
        share = mass * inverse
        if self.groups:
            masses = products[..., d_v : d_v + self.groups] * inverse[..., None]
            put("group_mass", masses, at)
        if row.best is not None:
            gone = hidden(row.empty, counted)
            best = row.best + at.c0 if at.c0 else row.best
            put("argmax", best.masked_fill(gone, -1), at)
        if "max" in names:
            # without a sink logit the shift is the maximum itself: e^0 = 1
            put("max", inverse if self.sink is None else self._share_of_top(row) * inverse, at)
        if request.topk:
            logit, index = row.t.topk(min(request.topk, row.t.shape[-1]), dim=-1)
            gone = hidden(logit <= FLOOR, None if counted is None else counted[..., None])
            prob = self.power(logit) * inverse[..., None]
            self.results.put_topk((index + at.c0).masked_fill_(gone, -1), prob, at)
        if "entropy" in names:
            # ln(total) = lse − m; t is not needed any more, so a small product goes into it
            if row.t.numel() > _SMALL:
                product = torch.einsum("bhnk,bhnk->bhn", row.t, row.p)
            else:
                product = row.t.mul_(row.p).sum(-1)
            most = (log_total * share).masked_fill_(row.empty, 0.0)
            put("entropy", most - product * (inverse / self.unit), at)
        self._positions(row, (products, share, inverse), at)
        for name, index in request.pairs.items():
            put(f"pair_mass:{name}", picked(row.p, index, at) * inverse, at)
        if request.received:
            receive(row.p, inverse, self.wanted, at)

    def _share_of_top(self, row: _Weighed) -> Tensor:
        return self.power(row.top - row.shift)

    def _positions(self, row: _Weighed, sums: tuple[Tensor, Tensor, Tensor], at: Chunk) -> None:
        """How far a row looks: mean distance, and the same cut off at `cap`."""
        products, share, inverse = sums
        vis, cap, put = self.call.vis, self.call.request.cap, self.results.put
        if "distance" in self.names and self.two_sided:
            put("distance", two_sided_distance(row.p, row.t, vis, at) * inverse, at)
        elif "distance" in self.names:
            ahead = torch.arange(at.r1 - at.r0, device=share.device) * share
            put("distance", ahead - products[..., self.d_v + self.groups + 1] * inverse, at)
        if "capped_distance" in self.names:
            near = nearness(row.p, vis, cap, at)
            put("capped_distance", cap * share - near * inverse, at)
