"""Attention over groups of keys that lie anywhere, a labelling a head: grouped attention states for
`spans.merge`.

The group that has most keys is a vendor call in which a bias hides all other keys (which costs
nothing, so that a rule takes little longer than plain attention); a group of few keys is listed:
its keys are gathered, and the product is as short as the list. Rows before a list's first key skip
it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..masking import FLOOR, INVISIBLE, Visibility
from . import vendor
from .spans import State

#: A group is listed where it has at most this part of the keys; a list costs about as much a key as
#: the vendor's call.
_LISTED = 4
#: Vendor calls with hidden keys that are still quicker than a pass over the keys in chunks.
_MAX_HIDDEN = 2
#: Logits over listed keys held at a time (elements).
_BUDGET = 1 << 20
#: Query rows at a time: later ones see longer lists.
_ROWS = 1024
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Plan:
    """Per group: `listed` (batch or 1, heads or 1, n) sorted columns, the number of keys where a
    head has fewer; None for a vendor call that hides the others (`hidden`), or for nothing at all
    where no head has keys in it."""

    labels: Tensor
    listed: tuple[Tensor | None, ...]
    hidden: tuple[int, ...]

    def __str__(self) -> str:
        lists = [str(columns.shape[-1]) for columns in self.listed if columns is not None]
        calls = f"{len(self.hidden)} vendor SDPA call{'s' * (len(self.hidden) > 1)}"
        return f"{calls} that hide{'s' * (len(self.hidden) == 1)} the other groups" + (
            f" and products with up to {', '.join(lists)} listed keys" if lists else ""
        )


def plan(labels: Tensor, groups: int, vis: Visibility) -> Plan | None:
    """How each group's state is made; None where chunks are better (many groups with many keys, or
    no key at all). Looks at the labels, so on a GPU it would wait."""
    listed: list[Tensor | None] = []
    hidden: list[int] = []
    column = torch.arange(vis.lk, device=labels.device)
    for group in range(groups):
        member = labels == group
        if vis.keys is not None:
            member = member & vis.keys[:, None]
        n = int(member.sum(-1).max())
        listed.append(None)
        if n * _LISTED > vis.lk:
            hidden.append(group)
        elif n:
            listed[group] = torch.where(member, column, vis.lk).sort(-1).values[..., :n]
    lengths = [columns.shape[-1] for columns in listed if columns is not None]
    if len(hidden) > _MAX_HIDDEN or 2 * sum(lengths) > vis.lk or not (hidden or lengths):
        return None
    return Plan(labels, tuple(listed), tuple(hidden))


def states(call: Call, shape: str, plan: Plan) -> list[list[State]]:
    """The states of each group, one or none; `shape` as in `vendor.attend`."""
    found: list[list[State]] = []
    for group, columns in enumerate(plan.listed):
        if columns is not None:
            made = listed(call, columns)
        elif group in plan.hidden:
            bias = torch.where(plan.labels == group, 0.0, -torch.inf)
            made = vendor.attend(call, shape, bias)
        else:
            found.append([])
            continue
        found.append([State(0, call.vis.lq, *made)])
    return found


def listed(call: Call, columns: Tensor) -> tuple[Tensor, Tensor]:
    """out (batch, heads, queries, d_v), 0 for rows that see none of the keys, and lse (batch,
    heads, queries), −inf there; columns as in `Plan`."""
    q, k, v, vis, dtype = call.q, call.k, call.v, call.vis, call.dtype
    (batch, heads, lq, d), (kv_heads, lk), d_v = q.shape, k.shape[1:3], v.shape[3]
    group, n = call.group, columns.shape[-1]
    shared = (
        columns.shape[1] == 1
    )  # the heads of a kv head read the same keys, and stand side by side as rows
    stacks = kv_heads if shared else heads
    at = columns.expand(batch, stacks, n).clamp_max(lk - 1)
    sample = torch.arange(batch, device=q.device)[:, None, None]
    head = (torch.arange(stacks, device=q.device) // (1 if shared else group))[None, :, None]
    # Logits in units of ln 2, as in `chunked`.
    keys = (k[sample, head, at].to(dtype) * (call.scale * _LOG2E)).transpose(
        -1, -2
    )  # (batch, stacks, d, n)
    values = v[sample, head, at].to(dtype)
    out = torch.zeros(batch, heads, lq, d_v, dtype=dtype, device=q.device)
    lse = torch.full((batch, heads, lq), -torch.inf, dtype=dtype, device=q.device)
    earliest, latest = columns.amin((0, 1)), columns.amax((0, 1))  # (n,) sorted
    rows = max(32, min(_ROWS, _BUDGET // (batch * heads * n)))
    # The last key that each row sees: never `lk`, which stands for no key.
    limit = torch.full((lq,), lk - 1, device=q.device)
    if vis.mask.causal:
        limit = torch.arange(lq, device=q.device) + (vis.mask.q_start - vis.mask.k_start)
        limit = limit.clamp_max(lk - 1)
    for r0 in range(0, lq, rows):
        r1 = min(r0 + rows, lq)
        width = int(torch.searchsorted(earliest, limit[r1 - 1], right=True))
        if not width:
            continue
        queries = q[:, :, r0:r1].to(dtype).reshape(batch, stacks, -1, d)
        s = (queries @ keys[..., :width]).view(batch, heads, r1 - r0, width)
        all_see = int(torch.searchsorted(latest, limit[r0], right=True))
        if all_see < width:
            beyond = columns[:, :, None, all_see:width] > limit[r0:r1, None]
            s[..., all_see:].masked_fill_(beyond, INVISIBLE)
        top = s.detach().amax(-1, keepdim=True).clamp_min_(FLOOR)
        p = s.sub_(top).exp2_()
        total = p.sum(-1, keepdim=True)
        none = total == 0
        safe = total.masked_fill(none, 1.0)  # the gradient of ln 0 would be infinite
        sums = (p.view(batch, stacks, -1, width) @ values[:, :, :width]).view(
            batch, heads, r1 - r0, d_v
        )
        out[:, :, r0:r1] = sums / safe
        lse[:, :, r0:r1] = (top / _LOG2E + safe.log()).masked_fill(none, -torch.inf)[..., 0]
    return out, lse
