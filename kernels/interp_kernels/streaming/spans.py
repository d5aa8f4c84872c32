"""Attention over groups of keys that are spans of columns, from vendor flash calls: grouped
attention states.

The columns are cut into segments at the spans' ends. Row r stands at column r + offset, so a
segment [s, e) is unseen by rows before s − offset, a causal square to the rows that stand in it,
and seen whole by later ones: no vendor call has an empty row or an offset diagonal. Each call gives
a state, the segment's normalised output ô and log-sum-exp. Then

    lse_g = ln Σ_{s in g} e^lse_s
    P_g = e^(lse_g − lse)
    out = Σ_s factor_g(P) · e^(lse_s − lse) · ô_s

Partition, never subtract: taking one group's share out of a finished output loses all accuracy
where that share is close to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call
from ..looking import may_look
from ..masking import FLOOR, INVISIBLE, Visibility, cast
from ..steer import Rule, factors

#: A fused call (q, k, v, causal, keys): the square causal diagonal, or every row sees every key;
#: keys (batch, keys) bool says which are real, None for all. Returns out (batch, heads, queries,
#: d_v) and its natural log-sum-exp (batch, heads, queries); rows that see no real key may hold
#: anything finite.
Flash = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], tuple[Tensor, Tensor]]

#: Segments up to this many columns are a plain product and softmax.
NARROW = 64
#: Logits of a narrow segment held at a time (elements).
_BUDGET = 1 << 18


@dataclass
class State:
    """Rows r0:r1 over one segment of keys: normalised out (batch, heads, rows or 1 (the same for
    all), d_v) and lse (batch, heads, rows) natural log; 0 and −inf for rows that see none of its
    keys."""

    r0: int
    r1: int
    out: Tensor
    lse: Tensor


def pieces(
    segments: list[tuple[int, int, int]], vis: Visibility, causal: bool
) -> Iterator[tuple[int, int, int, int, int, bool]]:
    """(group, r0, r1, s, e, square): which rows see which columns of each segment; square: along
    the diagonal, else all of them. `causal` False: every row sees every key."""
    if not causal:
        yield from ((group, 0, vis.lq, s, e, False) for s, e, group in segments)
        return
    offset = vis.mask.q_start - vis.mask.k_start
    for start, stop, group in segments:
        # Columns before the first row's are a cached prefix, seen whole; those after the last row's
        # are unseen.
        stop = min(stop, offset + vis.lq)
        if start < min(stop, offset):
            yield group, 0, vis.lq, start, min(stop, offset), False
        start = max(start, offset)
        if start < stop:
            yield group, start - offset, stop - offset, start, stop, True
            if stop - offset < vis.lq:
                yield group, stop - offset, vis.lq, start, stop, False


def states(call: Call, flash: Flash, *, causal: bool, narrow: int = NARROW) -> list[list[State]]:
    """The states of each group over its segments (`Call.segments`), which cover all columns once;
    those of up to `narrow` columns without `flash`."""
    vis = call.vis
    found: list[list[State]] = [[] for _ in range(call.steer.groups)]
    for group, r0, r1, s, e, square in pieces(call.segments, vis, causal):
        rows = call.q if r1 - r0 == vis.lq else call.q[:, :, r0:r1]
        keys, values = call.k.narrow(2, s, e - s), call.v.narrow(2, s, e - s)
        real = None if vis.keys is None or _unpadded(vis, s, e) else vis.keys[:, s:e]
        if e - s <= narrow:
            state = _narrow(rows, keys, values, square, real, call.scale)
        else:
            state = flash(rows, keys, values, square, real)
            if real is not None:
                empty = (
                    real.cumsum(-1) if square else real.sum(-1, keepdim=True)
                ) == 0  # (batch, rows or 1)
                out, lse = state
                state = (
                    out.masked_fill(empty[:, None, :, None], 0.0),
                    lse.masked_fill(empty[:, None], -torch.inf),
                )
        found[group].append(State(r0, r1, *state))
    return found


def padded(*tensors: Tensor) -> list[Tensor]:
    """The tensors with zeros behind their last dimension, as wide as the widest."""
    width = max(x.shape[3] for x in tensors)
    return [F.pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in tensors]


def _unpadded(vis: Visibility, s: int, e: int) -> bool:
    """No padding in the columns s:e, as far as one may ask without waiting for a device."""
    return may_look(vis.device) and (e <= vis.padded[0] or s >= vis.padded[1])


def _narrow(
    q: Tensor, k: Tensor, v: Tensor, square: bool, real: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse of a few keys by plain products, upcast, a chunk of rows at a time."""
    (batch, heads, lq, d), (kv_heads, width) = q.shape, k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = cast(k, dtype).transpose(-1, -2) * scale, cast(v, dtype)
    group = heads // kv_heads
    if width == 1 and real is None:  # the whole softmax: ô is the value itself
        chunk, keys = max(1, 64 * _BUDGET // (batch * heads * d)), keys.unsqueeze(2)
        # a product of batches head by head: the keys of a kv head once for each of its heads
        keys = keys.expand(-1, -1, group, -1, -1).reshape(batch * heads, d, 1)
        parts = [q] if lq <= chunk else q.split(chunk, 2)
        sides = [cast(rows, dtype).reshape(batch * heads, rows.shape[2], d) for rows in parts]
        logits = [torch.bmm(side, keys).view(batch, heads, side.shape[1]) for side in sides]
        lse = logits[0] if len(logits) == 1 else torch.cat(logits, -1)
        return values.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2), lse
    outs, lses = [], []
    chunk = max(1, _BUDGET // (batch * heads * width))
    for a in range(0, lq, chunk):
        rows = q if chunk >= lq else q[:, :, a : a + chunk]
        n = rows.shape[2]
        side = cast(rows, dtype).reshape(batch, kv_heads, group * n, d)
        s = (side @ keys).view(batch, heads, n, width)
        if square:
            seen = torch.ones(n, width, dtype=torch.bool, device=q.device).tril(a)
            s.masked_fill_(~seen, INVISIBLE)
        if real is not None:
            s.masked_fill_(~real[:, None, None], INVISIBLE)
        top = s.detach().amax(-1, keepdim=True).clamp_min(FLOOR)
        p = s.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        out = (p.view(batch, kv_heads, group * n, width) @ values).view(batch, heads, n, -1)
        none = total == 0
        safe = total.masked_fill(none, 1.0)  # the gradient of ln 0 would be infinite
        outs.append(out / safe)
        lses.append((top + safe.log()).masked_fill(none, -torch.inf).squeeze(-1))
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def merge(
    found: list[list[State]],
    rule: Rule | tuple[Rule, ...],
    sinks: Tensor | None,
    *,
    rows: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, rows, d_v) in `dtype` after the rule (or several), lse (batch, heads,
    rows) before it, with sinks (heads,). Rows that see nothing get 0 and −inf. `found`: the states
    of each group, between them at least one."""
    any_state = next(state for group in found for state in group)
    batch, heads, d_v = *any_state.lse.shape[:2], any_state.out.shape[-1]
    compute = torch.promote_types(dtype, torch.float32)
    differentiable = torch.is_grad_enabled() and any(s.lse.requires_grad for g in found for s in g)
    if differentiable:
        by_group = _differentiable_lse(found, rows, compute)
        joint = _log_sum(by_group)
    else:
        by_group = _lse_by_group(found, rows, compute)
        joint = torch.logsumexp(by_group, dim=-1)
    empty = joint == -torch.inf
    if sinks is not None:
        logit = sinks.to(joint)[None, :, None]
        lse = torch.logaddexp(joint, logit)
        sink = (logit - lse).exp()[..., None]
        joint = lse.masked_fill(empty, -torch.inf)
    else:
        lse, sink = joint.masked_fill(empty, 0.0), joint.new_zeros(())
    mass = (by_group - lse.unsqueeze(-1)).exp()
    factor = factors(mass, rule, sink)
    if all(len(group) == 1 and group[0].r1 - group[0].r0 == rows for group in found):
        out = _sum_of_whole([group[0] for group in found], factor * mass, compute)
        return cast(out, dtype), joint
    out = torch.zeros(batch, heads, rows, d_v, dtype=compute, device=lse.device)
    for g, group in enumerate(found):
        for state in group:
            at = slice(state.r0, state.r1)
            weight = factor[:, :, at, g] * (state.lse - lse[:, :, at]).exp()
            out[:, :, at].addcmul_(state.out.to(compute), weight[..., None])
    return out.to(dtype), joint


def _sum_of_whole(states: list[State], weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_g weights_g·ô_g where each group has one state of all rows (a decode step, which is bound
    by the number of operations: nothing is added to zeros)."""
    each = weights.unsqueeze(-2).unbind(-1)  # (batch, heads, rows, 1)
    out = cast(states[0].out, dtype) * each[0]
    for state, weight in zip(states[1:], each[1:], strict=True):
        out.addcmul_(cast(state.out, dtype), weight)
    return out


def _lse_by_group(found: list[list[State]], rows: int, dtype: torch.dtype) -> Tensor:
    """(batch, heads, rows, groups) log-sum-exp over all states of each group, −inf for none."""
    if all(len(group) == 1 and group[0].r1 - group[0].r0 == rows for group in found):
        return torch.stack([cast(group[0].lse, dtype) for group in found], -1)
    some = next(state for group in found for state in group).lse
    shape = (*some.shape[:2], rows, len(found))
    by_group = some.new_full(shape, -torch.inf, dtype=dtype)
    for g, group in enumerate(found):
        for state in group:
            here = by_group[:, :, state.r0 : state.r1, g]
            here.copy_(torch.logaddexp(here, state.lse.to(dtype)))
    return by_group


def _differentiable_lse(found: list[list[State]], rows: int, dtype: torch.dtype) -> Tensor:
    """The same out of place: each state's −inf beyond its rows, then a log-sum-exp over them."""
    some = next(state for group in found for state in group).lse
    nothing = some.new_full((*some.shape[:2], rows), -torch.inf, dtype=dtype)
    groups = []
    for group in found:
        each = [F.pad(s.lse.to(dtype), (s.r0, rows - s.r1), value=-torch.inf) for s in group]
        groups.append(_log_sum(torch.stack([nothing, *each], -1)) if each else nothing)
    return torch.stack(groups, -1)


def _log_sum(x: Tensor) -> Tensor:
    """logsumexp over the last dimension, whose gradient is 0 where all of it is −inf."""
    none = (x == -torch.inf).all(-1)
    return x.masked_fill(none[..., None], 0.0).logsumexp(-1).masked_fill(none, -torch.inf)


def attend(call: Call, flash: Flash, *, causal: bool) -> tuple[Tensor, Tensor]:
    """out in v's dtype and lse of the call with its edit's rule applied; as differentiable as
    `flash`."""
    rule, d_v, rows = call.steer.rule, call.v.shape[3], call.q.shape[2]
    assert rule is not None
    if call.q.shape[3] != d_v:  # as for the plain call
        q, k, v = padded(call.q, call.k, call.v)
        call = replace(call, q=q, k=k, v=v)
    found = states(call, flash, causal=causal)
    out, lse = merge(found, rule, call.sinks, rows=rows, dtype=call.v.dtype)
    return out if out.shape[3] == d_v else out[..., :d_v], lse
