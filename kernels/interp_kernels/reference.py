"""The definition: eager attention and its statistics, plain and slow. Everything else is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .masking import Visibility, bias_visible, compute_dtype
from .spec import Mask, Request, Result


def _logits(
    q: Tensor, k: Tensor, *, mask: Mask, scale: float, softcap: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Visibility]:
    """Logits (batch, heads, queries, keys), −inf where unseen; visible, same shape, bool."""
    batch, heads, lq, _ = q.shape
    lk = k.shape[2]
    keys = k.to(dtype).repeat_interleave(heads // k.shape[1], dim=1)
    logits = scale * (q.to(dtype) @ keys.transpose(-1, -2))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    vis = Visibility(mask, batch, heads, lq, lk, q.device)
    visible = vis.visible(slice(None), slice(None), 0, lq, 0, lk).expand(logits.shape)
    if mask.dense is not None and mask.dense.dtype != torch.bool:
        bias = mask.dense.to(q.device)
        logits = logits + torch.where(bias_visible(bias), bias, 0).to(dtype)
    return logits.masked_fill(~visible, -torch.inf), visible, vis


def _softmax(logits: Tensor, visible: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """A (batch, heads, queries, keys) over the real keys, and lse (batch, heads, queries) including the sink."""
    if sinks is not None:
        column = sinks.to(logits)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], dim=-1)
    empty = ~visible.any(-1)
    safe = logits.masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(safe, -1)
    a = torch.exp(safe - lse[..., None])[..., : visible.shape[-1]]
    return a.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)


def weights(
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """A (batch, heads, queries, keys): exp(logit − lse), 0 where unseen. For tests and tiny inputs: it is L × L."""
    logits, visible, _ = _logits(q, k, mask=mask, scale=scale, softcap=softcap, dtype=compute_dtype(q, k))
    return _softmax(logits, visible, sinks)[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    request: Request | None = None,
) -> Result:
    """out = A V with q (batch, heads, queries, d), k (batch, kv_heads, keys, d), v (batch, kv_heads, keys, d_v)."""
    dtype = compute_dtype(q, k, v)
    logits, visible, vis = _logits(q, k, mask=mask, scale=scale, softcap=softcap, dtype=dtype)
    a, lse = _softmax(logits, visible, sinks)
    out = a @ v.to(dtype).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    with torch.no_grad():
        stats = statistics(a, visible, vis, request or Request())
    return Result(out.to(v.dtype), lse, stats)


def statistics(a: Tensor, visible: Tensor, vis: Visibility, request: Request) -> dict[str, Tensor]:
    """Every requested statistic from the whole A, one line of definition each."""
    stats: dict[str, Tensor] = {}
    batch, heads, lq, lk = a.shape
    rows = vis.row_set()[:, None, :, None]
    a, visible = a * rows, visible & rows
    distance = (vis.q_slots(0, lq)[:, None] - vis.k_slots(0, lk)).abs().to(a.dtype)
    if "entropy" in request.names:
        stats["entropy"] = torch.special.entr(a).sum(-1)
    if "max" in request.names:
        stats["max"] = a.amax(-1)
    if "argmax" in request.names:
        best = a.masked_fill(~visible, -1.0).argmax(-1)
        stats["argmax"] = best.masked_fill(~visible.any(-1), -1)
    if "distance" in request.names:
        stats["distance"] = (a * distance).sum(-1)
    if "capped_distance" in request.names:
        stats["capped_distance"] = (a * distance.clamp(max=request.cap)).sum(-1)
    if "group_mass" in request.names:
        assert request.labels is not None
        groups = torch.arange(request.n_groups, device=a.device)
        onehot = (request.labels.to(a.device)[..., None] == groups).to(a.dtype)
        stats["group_mass"] = a @ onehot[:, None]
    for name, index in request.pairs.items():
        index = index.to(a.device).expand(batch, lq, -1)[:, None].expand(-1, heads, -1, -1)
        picked = a.gather(-1, index.clamp_min(0)) * (index >= 0)
        stats[f"pair_mass:{name}"] = picked.sum(-1)
    for name, question in request.received.items():
        counted = visible & vis.row_set(question.queries)[:, None, :, None]
        if question.band is not None:
            counted = counted & vis.band(question.band, 0, lq, 0, lk)
        count = counted.sum(-2)
        received = (a * counted).amax(-2) if question.reduce == "max" else (a * counted).sum(-2)
        received = received / count.clamp_min(1) if question.reduce == "mean" else received
        stats[f"received:{name}"] = pick(received, question.keys)
        per_head = vis.mask.dense is not None and vis.mask.dense.shape[1] > 1
        stats[f"received_count:{name}"] = count if per_head else count[:, :1]
    if request.topk:
        n = min(request.topk, lk)
        prob, index = a.masked_fill(~visible, -1.0).topk(n, dim=-1)
        stats["topk_index"] = torch.nn.functional.pad(index.masked_fill(prob < 0, -1), (0, request.topk - n), value=-1)
        stats["topk_prob"] = torch.nn.functional.pad(prob.clamp_min(0), (0, request.topk - n))
    return stats


def pick(received: Tensor, keys: Tensor | None) -> Tensor:
    """(batch, heads, n): the asked columns of (batch, heads, keys), 0 for −1; all of them for None."""
    if keys is None:
        return received
    keys = keys.to(received.device).expand(*received.shape[:2], -1)
    return received.gather(-1, keys.clamp_min(0)) * (keys >= 0)
