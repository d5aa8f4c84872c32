"""Σ A over a few listed keys a row: exp(q·k − lse), no pass over the other keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..budget import ranges
from ..call import Call
from ..masking import Visibility, bias_visible, compute_dtype


def pair_mass(
    call: Call,
    lse: Tensor,
    index: Tensor,
    factors: Tensor | None = None,
    labels: Tensor | None = None,
    blend: Tensor | None = None,
) -> Tensor:
    """Σ A over the listed keys (batch, heads, queries); index (batch or 1, queries or 1, m) key
    columns, −1 for none.

    A counts temper and bias of the call's edit. Of weights after its rules and its blend: factors
    (batch, heads, queries, groups) by labels (batch or 1, heads or 1, keys) of the keys, and blend
    (batch or 1, heads, queries), the weight of each row's own key.

    One index row for all queries (say, the first key) needs only m keys; otherwise keys are
    gathered for a chunk of rows at a time, in O(chunk · m · d) memory, once a kv head. Queries are
    upcast a chunk at a time too.
    """
    q, k, vis, softcap = call.q, call.k, call.vis, call.softcap
    batch, heads, lq, d = q.shape
    kv_heads, m = k.shape[1], index.shape[-1]
    dtype = compute_dtype(q, k)
    index = index.to(q.device).expand(batch, *index.shape[1:])
    shared = index.shape[1] == 1
    mass = torch.zeros(batch, heads, lq, dtype=dtype, device=q.device)
    if not m or not lq or not vis.lk:
        return mass
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, lq, d)
    rows = vis.row_set()
    keys = _gathered(k, index, dtype) if shared else k
    # what a row holds: its queries and logits, and the keys that are its own
    each = batch * (heads * max(d, m) if shared else max(heads * max(d, m), kv_heads * m * d))
    for r0, r1 in ranges(lq, each, q.device):
        picked = index if shared else index[:, r0:r1]
        if not shared:
            keys = _gathered(k, picked, dtype)
        queries = grouped[:, :, :, r0:r1].to(dtype)
        if shared:
            logits = queries @ keys[:, :, 0, None].transpose(-1, -2)
        elif m == 1:
            # One multiply and one sum; a batched product of 1×d by d×1 matrices is several times
            # slower.
            logits = (queries * keys[:, :, None, :, 0]).sum(-1, keepdim=True)
        else:
            logits = torch.einsum("bngrd,bnrmd->bngrm", queries, keys)
        logits = (logits * call.scale).reshape(batch, heads, r1 - r0, m)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        at = picked.clamp_min(0).expand(-1, r1 - r0, -1)  # (batch, rows, m)
        real = (picked >= 0) & rows[:, r0:r1, None]
        seen = (real & _seen(vis, at, r0, r1))[:, None]
        logits, shown = _edited(call, logits, at, r0, r1)
        weight = torch.exp(logits - lse[:, :, r0:r1, None].to(dtype))
        weight = weight.masked_fill_(~(seen if shown is None else seen & shown), 0.0)
        if factors is not None:
            part = factors[:, :, r0:r1].to(dtype)
            weight *= part if labels is None else part.gather(-1, _of_keys(labels, at, heads))
        if blend is not None:
            own = (vis.q_slots(r0, r1)[:, None] == at + vis.mask.k_start) & real
            weight += blend[:, :, r0:r1, None].to(dtype) * own[:, None]
        mass[:, :, r0:r1] = weight.sum(-1)
    return mass


def _edited(
    call: Call, logits: Tensor, at: Tensor, r0: int, r1: int
) -> tuple[Tensor, Tensor | None]:
    """Logits (batch, heads, rows, m) of the columns `at` after temper, bias and a dense mask, and
    which of them neither hides (None: all)."""
    steer, dense, shown = call.steer, call.mask.dense, None
    if steer.temper is not None:
        temper = steer.temper if steer.temper.shape[2] == 1 else steer.temper[:, :, r0:r1]
        logits = logits * temper.to(logits)[..., None]
    given = []
    if steer.bias is not None:
        given.append(_of_keys(steer.bias.to(at.device), at, steer.bias.shape[1]))
    if dense is not None:
        part = dense[:, :, r0:r1].to(at.device).expand(len(at), -1, -1, -1)
        given.append(part.gather(-1, at[:, None].expand(-1, part.shape[1], -1, -1)))
    for one in given:
        kept = one if one.dtype == torch.bool else bias_visible(one)
        shown = kept if shown is None else shown & kept
        if one.dtype != torch.bool:
            logits = logits + torch.where(kept, one, 0).to(logits)
    return logits, shown


def _of_keys(values: Tensor, at: Tensor, heads: int) -> Tensor:
    """(batch, heads, rows, m): values (batch or 1, heads or 1, keys) at columns (batch, rows,
    m)."""
    batch, rows, m = at.shape
    spread = values.expand(batch, heads, -1)
    return spread.gather(-1, at.flatten(1)[:, None].expand(-1, heads, -1)).view(
        batch, heads, rows, m
    )


def _gathered(k: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, kv_heads, rows or 1, m, d) the listed keys; index_select copies whole rows, gather
    would go element by element."""
    column = index.clamp_min(0)
    each = [k[b].index_select(1, column[b].flatten()) for b in range(len(k))]
    return torch.stack(each).to(dtype).unflatten(2, column.shape[1:])


def _seen(vis: Visibility, column: Tensor, r0: int, r1: int) -> Tensor:
    """(batch, rows, m) bool: the row sees that column; compact masks only."""
    mask = vis.mask
    distance = vis.q_slots(r0, r1)[:, None] - (column + mask.k_start)
    seen = distance >= 0 if mask.causal else torch.ones_like(distance, dtype=torch.bool)
    if mask.window is not None:
        near = distance.abs() < mask.window
        seen = seen & (near if not vis.keep_first else near | vis.kept(slice(None), column))
    if vis.keys is not None:
        seen = seen & vis.keys.gather(1, column.flatten(1)).reshape(column.shape)
    return seen
