"""A `Steer` made ready for one call or one block of it: what the PyTorch routes do with it, chunk
by chunk."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..budget import ranges
from ..masking import FLOOR, INVISIBLE, Visibility, bias_visible
from ..steer import Rule, Steer, segments, share_out

#: Columns of a one-hot label matrix are a multiple: a product with 16 columns takes half the time
#: of one with 2.
_WIDE = 16
#: Outputs up to so many elements are not worth cutting: a decode step is bound by operations.
_SMALL = 1 << 16


def shown_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias with INVISIBLE where it hides the key."""
    return torch.where(bias_visible(bias), bias, INVISIBLE).to(dtype)


def part(x: Tensor, *where: slice) -> Tensor:
    """x cut along its leading dimensions, those of size 1 (shared) left whole."""
    cut = zip(x.shape, where, strict=False)
    if all(size == 1 or (not s.start and s.stop in (None, size)) for size, s in cut):
        return x
    return x[
        tuple(slice(None) if size == 1 else s for size, s in zip(x.shape, where, strict=False))
    ]


def own_keys(vis: Visibility) -> tuple[Tensor, Tensor]:
    """Each query's own key: its column (queries,), cut to those there are, and whether the mask
    lets the query see it, (batch or 1, heads or 1, queries) bool."""
    column = torch.arange(vis.lq, device=vis.device) + (vis.mask.q_start - vis.mask.k_start)
    seen = ((column >= 0) & (column < vis.lk))[None, None]
    column = column.clamp(0, max(vis.lk - 1, 0))
    if not vis.lk:
        return column, seen
    if vis.keys is not None:
        seen = seen & vis.keys[:, None, column]
    if vis.mask.dense is not None:
        dense = vis.mask.dense.to(vis.device)[:, :, torch.arange(vis.lq, device=vis.device), column]
        seen = seen & (dense if dense.dtype == torch.bool else bias_visible(dense))
    return column, seen


def finish(out: Tensor, v: Tensor, vis: Visibility, steer: Steer) -> Tensor:
    """gain·((1 − u)·out + u·v_own): what `blend` and `gain` do to the output (batch, heads,
    queries, d_v). Where nothing is differentiated, some rows at a time: all of them upcast are
    twice the output."""
    if steer.blend is None and steer.gain is None:
        return out
    tensors = (out, v, steer.blend, steer.gain)
    own = own_keys(vis) if steer.blend is not None and vis.lk else None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _finished(out, v, steer, own, 0, vis.lq)
    batch, heads, lq, d_v = out.shape
    if batch * heads * lq * d_v <= _SMALL:
        return _finished(out, v, steer, own, 0, lq)
    done = torch.empty_like(out)
    for r0, r1 in ranges(lq, batch * heads * d_v, out.device):
        done[:, :, r0:r1] = _finished(out[:, :, r0:r1], v, steer, own, r0, r1)
    return done


def _finished(
    out: Tensor, v: Tensor, steer: Steer, own: tuple[Tensor, Tensor] | None, r0: int, r1: int
) -> Tensor:
    """The same for rows r0:r1; own: the queries' own keys, and whether they are seen."""
    dtype, (heads, kv_heads) = out.dtype, (out.shape[1], v.shape[1])
    compute, rows = torch.promote_types(dtype, torch.float32), slice(r0, r1)
    out = out.to(compute)
    if steer.blend is not None and own is not None:
        column, seen = own[0][rows], own[1][..., rows]
        # (batch or 1, heads, queries, 1)
        weight = (steer.blend.to(out)[None, :, None] * seen)[..., None]
        values = v[:, :, column].to(compute)[:, :, None]
        values = values.expand(-1, -1, heads // kv_heads, -1, -1).flatten(1, 2)
        out = torch.lerp(out, values, weight)
    if steer.gain is not None:
        gain = part(steer.gain, slice(None), slice(None), rows)
        out = out * gain.to(out)[..., None]
    return out.to(dtype)


def _part_of(rule: Rule, bs: slice, hs: slice) -> Rule:
    return replace(
        rule,
        keep=part(rule.keep, hs),
        receive=None if rule.receive is None else part(rule.receive, hs),
        rows=None if rule.rows is None else part(rule.rows, bs),
    )


class SteerBlock:
    """The part of a `Steer` that batch entries `bs` and query heads `hs` need, in `dtype`,
    differentiable; the bias times `unit`, for logits that are."""

    def __init__(
        self,
        steer: Steer,
        vis: Visibility,
        bs: slice,
        hs: slice,
        dtype: torch.dtype,
        unit: float = 1.0,
    ) -> None:
        self.sigmoid, self.vis, self.dtype = steer.sigmoid, vis, dtype
        self.temper = (
            None
            if steer.temper is None
            else part(steer.temper.to(vis.device, dtype), bs, hs)[..., None]
        )
        self.bias: Tensor | None = None
        self.blend: Tensor | None = None
        self.onehot: Tensor | None = None
        if steer.bias is not None:
            self.bias = (
                shown_bias(part(steer.bias.to(vis.device), bs, hs), dtype)[:, :, None] * unit
            )
        if steer.blend is not None:
            self.blend = part(steer.blend.to(vis.device, dtype), hs)
            self.own = part(own_keys(vis)[1], bs, hs)
        self.groups, self.rules = (
            steer.groups,
            [_part_of(rule.to(vis.device), bs, hs) for rule in steer.rules],
        )
        self.spans: list[tuple[int, int, int]] = []
        if not self.rules:
            return
        if steer.labels is None:
            self.spans = segments(steer.spans, vis.lk)
        else:
            labels = part(steer.labels.to(vis.device), bs, hs)
            columns = torch.arange(-(-self.groups // _WIDE) * _WIDE, device=vis.device)
            self.onehot = (labels[..., None] == columns).to(dtype)

    @property
    def reweighs(self) -> bool:
        """The final weights are not exp(logit − lse)."""
        return bool(self.rules) or self.blend is not None

    def logits(self, s: Tensor, r0: int, r1: int, c0: int, c1: int, *, in_place: bool) -> Tensor:
        """temper·s + bias with s (batch, heads, rows, columns); INVISIBLE and below where the bias
        hides the key."""
        if self.temper is not None:
            temper = part(self.temper, slice(None), slice(None), slice(r0, r1))
            s = s.mul_(temper) if in_place else s * temper
        if self.bias is not None:
            s = s.add_(self.bias[..., c0:c1]) if in_place else s + self.bias[..., c0:c1]
        return s

    def masses(self, p: Tensor, c0: int, c1: int) -> Tensor:
        """(batch, heads, rows, groups): Σ of p (batch, heads, rows, columns) over the keys of each
        group."""
        if self.onehot is None:
            sums: list[Tensor | None] = [None] * self.groups
            for a, b, group in self._inside(c0, c1):
                own, before = p[..., a:b].sum(-1), sums[group]
                sums[group] = own if before is None else before + own
            nothing = p.new_zeros(p.shape[:3]) if any(x is None for x in sums) else p
            return torch.stack([nothing if x is None else x for x in sums], dim=-1)
        onehot = self.onehot[:, :, c0:c1]
        if onehot.shape[1] > 1:
            return (p @ onehot)[..., : self.groups]
        return (p.flatten(1, 2) @ onehot[:, 0]).view(*p.shape[:3], -1)[..., : self.groups]

    def factors(self, mass: Tensor, sink: Tensor, r0: int, r1: int) -> Tensor:
        """`steer.factors` for rows r0:r1: masses (batch, heads, rows, groups), the sink logit's
        (batch, heads, rows, 1)."""
        return self._share_out(mass, sink, r0, r1)[0]

    def _share_out(self, mass: Tensor, sink: Tensor, r0: int, r1: int) -> tuple[Tensor, Tensor]:
        cut = [
            rule if rule.rows is None else replace(rule, rows=rule.rows[:, r0:r1])
            for rule in self.rules
        ]
        return share_out(mass, cut, sink)

    def scale(self, p: Tensor, factor: Tensor, c0: int, c1: int) -> Tensor:
        """p·factor of the key's group, out of place; factor (batch, heads, rows, groups)."""
        if self.onehot is None:
            return torch.cat(
                [p[..., a:b] * factor[..., g : g + 1] for a, b, g in self._inside(c0, c1)], dim=-1
            )
        return p * (factor @ self.onehot[:, :, c0:c1, : factor.shape[-1]].transpose(-1, -2))

    def scale_(self, p: Tensor, factor: Tensor, c0: int, c1: int, scratch: Tensor) -> None:
        """The same in place; scratch as large as p."""
        if self.onehot is None:
            for a, b, group in self._inside(c0, c1):
                p[..., a:b].mul_(factor[..., group : group + 1])
            return
        heads = self.onehot.shape[1]
        labels = self.onehot[:, :, c0:c1, : factor.shape[-1]].expand(p.shape[0], -1, -1, -1)
        stacked = factor.reshape(
            p.shape[0] * heads, -1, factor.shape[-1]
        )  # rows of heads with one labelling
        each = scratch.view(*stacked.shape[:2], p.shape[-1])
        torch.bmm(stacked, labels.flatten(0, 1).transpose(1, 2), out=each)
        p.mul_(each.view(p.shape))

    def _inside(self, c0: int, c1: int) -> list[tuple[int, int, int]]:
        """The segments inside c0:c1, counted from c0."""
        return [
            (max(a, c0) - c0, min(b, c1) - c0, g) for a, b, g in self.spans if a < c1 and b > c0
        ]

    def blend_(self, a: Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        """A ← (1 − u)·A + u·I in place; a (batch, heads, rows, columns)."""
        if self.blend is None:
            return
        weight = self.blend[None, :, None] * self.own[..., r0:r1]  # (batch or 1, heads or 1, rows)
        a.mul_(1 - weight[..., None])
        first = (
            self.vis.mask.q_start - self.vis.mask.k_start + r0 - c0
        )  # own column of the first row
        i, j = max(0, -first), min(r1 - r0, c1 - c0 - first)
        if i < j:
            own = a[:, :, i:j, first + i : first + j].diagonal(dim1=-2, dim2=-1)
            own.add_(weight[..., i:j])

    def blended(self, a: Tensor, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        """The same out of place, differentiable."""
        if self.blend is None:
            return a
        weight = (self.blend[None, :, None] * self.own[..., r0:r1])[..., None]
        own = self.vis.q_slots(r0, r1)[:, None] == self.vis.k_slots(c0, c1)
        return a * (1 - weight) + weight * own

    def edited_(
        self, a: Tensor, sink: Tensor, r0: int, r1: int, c0: int, c1: int, scratch: Tensor
    ) -> Tensor:
        """The rules, then the blend, on whole weights A (batch, heads, rows, columns), in place;
        sink (batch, heads, rows, 1) the sink logit's share, returned as it is afterwards; scratch
        as large as a."""
        if self.rules:
            factor, sink = self._share_out(self.masses(a, c0, c1), sink, r0, r1)
            self.scale_(a, factor, c0, c1, scratch)
        self.blend_(a, r0, r1, c0, c1)
        return self._unblended(sink, r0, r1)

    def edited(
        self, a: Tensor, sink: Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> tuple[Tensor, Tensor]:
        """The same out of place, differentiable: A and the sink logit's share."""
        if self.rules:
            factor, sink = self._share_out(self.masses(a, c0, c1), sink, r0, r1)
            a = self.scale(a, factor, c0, c1)
        return self.blended(a, r0, r1, c0, c1), self._unblended(sink, r0, r1)

    def _unblended(self, sink: Tensor, r0: int, r1: int) -> Tensor:
        """What the blend leaves of the sink logit's share."""
        if self.blend is None:
            return sink
        return sink * (1 - self.blend[None, :, None] * self.own[..., r0:r1])[..., None]

    def shown(
        self, a: Tensor, bs: slice, hs: slice, r0: int, r1: int, c0: int, c1: int
    ) -> Tensor | None:
        """(batch or 1, heads or 1, rows, columns) bool: keys an index may name: seen, and not
        hidden by the bias unless blending gave it weight; None for all."""
        if self.bias is None and self.vis.all_seen(r0, r1, c0, c1):
            return None
        seen = self.vis.visible(bs, hs, r0, r1, c0, c1)
        if self.bias is None:
            return seen
        return seen & ((self.bias[..., c0:c1] > FLOOR) | (a > 0))
