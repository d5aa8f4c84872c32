"""Σ A over a few listed keys a row: exp(q·k − lse), no pass over the other keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..budget import ranges
from ..call import Call
from ..masking import Visibility, compute_dtype


def pair_mass(call: Call, lse: Tensor, index: Tensor) -> Tensor:
    """Σ A over the listed keys (batch, heads, queries); index (batch or 1, queries or 1, m) key
    columns, −1 for none.

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
        seen = (picked >= 0) & _seen(vis, picked.clamp_min(0), r0, r1) & rows[:, r0:r1, None]
        weight = torch.exp(logits - lse[:, :, r0:r1, None].to(dtype))
        mass[:, :, r0:r1] = weight.masked_fill_(~seen[:, None], 0.0).sum(-1)
    return mass


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
