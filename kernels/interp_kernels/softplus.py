"""Softplus attention without and with re-weighting (LSSA, LSSAR; arXiv 2501.13428).

With q̂, k̂ of unit length, N_i the number of keys that row i sees and sums over those:

    S_ij = softplus(ln d · ln N_i · q̂_i·k̂_j)
    A_ij = S_ij / Σ_j S_ij
    (LSSA)
    R_ij = ReLU(N_i·A_ij − 1)^p
    A'_ij = R_ij / Σ_j R_ij
    (LSSAR)

and rows of A' with fewer than four keys are 0. The threshold needs the sum of its row first, so
that no running maximum or log-sum-exp can do it: a chunk of query rows holds its weights, O(chunk ·
keys), and sums twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .masking import Visibility, bias_visible, compute_dtype
from .request import Mask

#: Weights held at a time (elements), and the rows that are at most.
_BUDGET, _MAX_ROWS = 1 << 22, 128
#: Rows that see fewer keys are 0 after the re-weighting.
_FEWEST = 4


def softplus_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    power: float | None = 3.0,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """Output of softplus attention, A'·v, or A·v with power None. Differentiable, any device.

    Args:
        q: queries (batch, heads, queries, d); head h reads key-value head h // (heads // kv_heads).
        k: keys (batch, kv_heads, keys, d).
        v: values (batch, kv_heads, keys, d_v).
        mask: `Mask`, default plain causal; a dense float bias is added inside the softplus.
        power: p of the re-weighting, at least 1; None for none.
        heads: only these query heads, in this order; the result has as many.

    Returns:
        (batch, heads, queries, d_v) in v's dtype, 0 in rows that see nothing.

    Raises:
        ValueError: naming the argument that does not fit.

    Example:
        >>> q = torch.ones(1, 1, 2, 4)
        >>> v = torch.tensor([[[[1.0], [3.0]]]])
        >>> softplus_attention(q, q, v, power=None).flatten()
        tensor([1., 2.])
    """
    if power is not None and power < 1:
        raise ValueError(f"power is {power}; it must be at least 1, or None for no re-weighting.")
    if (
        q.ndim != 4
        or k.ndim != 4
        or k.shape[:3] != v.shape[:3]
        or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3])
    ):
        raise ValueError(
            f"Shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    (batch, n_heads, lq), (kv_heads, lk) = q.shape[:3], k.shape[1:3]
    if not kv_heads or n_heads % kv_heads:
        raise ValueError(f"{n_heads} query heads cannot share {kv_heads} key-value heads evenly.")
    if heads is not None and not all(0 <= h < n_heads for h in heads):
        raise ValueError(f"heads {list(heads)} are not all among the {n_heads} there are, from 0.")
    mask = mask or Mask()
    Visibility(mask, batch, n_heads, lq, lk, q.device)  # checks it
    if heads is not None:  # each brings its keys along
        chosen, of = list(heads), [h // (n_heads // kv_heads) for h in heads]
        q, k, v = q[:, chosen], k[:, of], v[:, of]
        if mask.dense is not None and mask.dense.shape[1] > 1:
            mask = replace(mask, dense=mask.dense[:, chosen])
    if not q.numel() or not lk:
        return v.new_zeros(*q.shape[:3], v.shape[3])
    return _attention(q, k, v, Visibility(mask, batch, q.shape[1], lq, lk, q.device), power)


def _attention(q: Tensor, k: Tensor, v: Tensor, vis: Visibility, power: float | None) -> Tensor:
    (batch, heads, lq, d), (kv_heads, d_v) = q.shape, (k.shape[1], v.shape[3])
    dtype, every = compute_dtype(q, k, v), slice(None)
    keys, noise = F.normalize(k.to(dtype), dim=-1), 16 * torch.finfo(dtype).eps

    def rows(q: Tensor, keys: Tensor, v: Tensor, r0: int, r1: int) -> Tensor:
        c0, c1 = vis.span(r0, r1)
        n, side = r1 - r0, heads // kv_heads * (r1 - r0)
        if c0 == c1:
            return v.new_zeros(batch, heads, n, d_v)
        seen = vis.visible(every, every, r0, r1, c0, c1)  # (batch or 1, heads or 1, rows, columns)
        count = seen.sum(-1, keepdim=True).to(dtype)
        # query heads of one kv head side by side, so that keys are not repeated
        queries = F.normalize(q[:, :, r0:r1].to(dtype), dim=-1).reshape(batch, kv_heads, side, d)
        cosine = (queries @ keys[:, :, c0:c1].transpose(-1, -2)).view(batch, heads, n, c1 - c0)
        s = cosine * (math.log(d) * count.clamp_min(1).log())
        dense = vis.mask.dense
        if dense is not None and dense.dtype != torch.bool:
            bias = dense[:, :, r0:r1, c0:c1].to(q.device)
            s = s + torch.where(bias_visible(bias), bias, 0).to(dtype)
        a = _normalised(F.softplus(s, threshold=40.0).masked_fill(~seen, 0.0))
        if power is not None:
            above = count * a - 1
            above = above.masked_fill(
                ~seen | (count < _FEWEST) | (above < noise), 0.0
            )  # a uniform row is 0
            top = above.detach().amax(
                -1, keepdim=True
            )  # cancels; without it a large power overflows
            a = _normalised((above / torch.where(top > 0, top, 1)) ** power)
        out = a.reshape(batch, kv_heads, side, c1 - c0) @ v[:, :, c0:c1].to(dtype)
        return out.view(batch, heads, n, d_v).to(v.dtype)

    chunk = min(_MAX_ROWS, max(1, _BUDGET // max(batch * heads * vis.lk, 1)))
    ranges = [(r0, min(r0 + chunk, lq)) for r0 in range(0, lq, chunk)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        parts = [checkpoint(rows, q, keys, v, *at, use_reentrant=False) for at in ranges]
    else:
        parts = [rows(q, keys, v, *at) for at in ranges]
    return torch.cat(parts, 2)


def _normalised(x: Tensor) -> Tensor:
    """x ≥ 0 divided by the sum of its row; a row of zeros stays one."""
    total = x.sum(-1, keepdim=True)
    return x / torch.where(total > 0, total, 1)
