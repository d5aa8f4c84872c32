"""The definition: eager attention and its statistics, plain and slow. Everything else is tested
against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call, prepare
from .compose import Steers
from .masking import Visibility, bias_visible, compute_dtype
from .request import Mask, Received, Request, Result
from .steer import Steer, share_out


def _logits(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (batch, heads, queries, keys), −inf where unseen or hidden by an edit's bias; visible
    by the mask, and shown (not hidden by the bias either), same shape, bool."""
    q, softcap, vis, dense = call.q, call.softcap, call.vis, call.mask.dense
    keys = call.k.to(dtype).repeat_interleave(call.group, dim=1)
    logits = call.scale * (q.to(dtype) @ keys.transpose(-1, -2))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    for steer in call.steers:
        if steer.temper is not None:
            logits = logits * steer.temper.to(logits)[..., None]
    visible = vis.visible(slice(None), slice(None), 0, vis.lq, 0, vis.lk).expand(logits.shape)
    if dense is not None and dense.dtype != torch.bool:
        bias = dense.to(q.device)
        logits = logits + torch.where(bias_visible(bias), bias, 0).to(dtype)
    shown = visible
    for steer in call.steers:
        if steer.bias is not None:
            kept = bias_visible(steer.bias.to(q.device))[:, :, None]
            logits = logits + torch.where(kept, steer.bias.to(q.device)[:, :, None], 0).to(dtype)
            shown = shown & kept
    return logits.masked_fill(~shown, -torch.inf), visible, shown


def _softmax(logits: Tensor, visible: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """A (batch, heads, queries, keys) over the real keys, and lse (batch, heads, queries) including
    the sink."""
    if sinks is not None:
        column = sinks.to(logits)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], dim=-1)
    empty = ~visible.any(-1)
    safe = logits.masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(safe, -1)
    a = torch.exp(safe - lse[..., None])[..., : visible.shape[-1]]
    return a.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)


def _sigmoid(logits: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """A = σ(logits + offset), which is 0 at −inf, and ln Σ_k A."""
    a = torch.sigmoid(logits + offset)
    total = a.sum(-1)
    return a, torch.where(total > 0, total, 1).log().masked_fill(total == 0, -torch.inf)


def edited(
    a: Tensor, sink: Tensor, visible: Tensor, vis: Visibility, steer: Steer
) -> tuple[Tensor, Tensor]:
    """An edit's rules, then its blend, on A (batch, heads, queries, keys) and on the sink logit's
    share (batch, heads, queries, 1)."""
    for rule in steer.rules:
        labels = steer.labels_of(vis.lk, a.device).expand(*a.shape[:2], -1)
        mass = a @ torch.nn.functional.one_hot(labels, rule.groups).to(
            a
        )  # (batch, heads, queries, groups)
        factor, sink = share_out(mass, rule, sink)
        a = a * factor.gather(-1, labels[:, :, None].expand(a.shape))
    if steer.blend is not None:
        own = (vis.q_slots(0, vis.lq)[:, None] == vis.k_slots(0, vis.lk)) & visible
        u = steer.blend.to(a)[:, None, None] * own.any(-1, keepdim=True)
        a, sink = (1 - u) * a + u * own, (1 - u) * sink
    return a, sink


def _weights(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A after all edits, lse, visible by the mask, and what an index may name."""
    sinks, steers = call.sinks, call.steers
    logits, visible, shown = _logits(call, dtype)
    sigmoid = next((s.sigmoid for s in steers if s.sigmoid is not None), None)
    a, lse = _softmax(logits, shown, sinks) if sigmoid is None else _sigmoid(logits, sigmoid)
    sink = torch.zeros_like(lse)[..., None]
    if sinks is not None:
        empty = lse == -torch.inf
        sink = torch.exp(sinks.to(lse)[None, :, None] - lse.masked_fill(empty, 0.0)).masked_fill(
            empty, 0.0
        )[..., None]
    for one in steers:
        a, sink = edited(a, sink, visible, call.vis, one)
    return a, lse, visible, shown | (visible & (a > 0))


def weights(
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    steer: Steers = None,
) -> Tensor:
    """A (batch, heads, queries, keys): exp(logit − lse), edited, 0 where unseen. For tests and tiny
    inputs: L × L."""
    call = prepare(
        q, k, k, fuse=False, mask=mask, scale=scale, softcap=softcap, sinks=sinks, steer=steer
    )
    return _weights(call, compute_dtype(q, k))[0]


def attention(call: Call) -> Result:
    """out = gain·A V, by the definition, with A as edited."""
    v = call.v
    a, lse, visible, shown = _weights(call, call.dtype)
    out = a @ v.to(call.dtype).repeat_interleave(call.group, dim=1)
    for one in call.steers:
        if one.gain is not None:
            out = out * one.gain.to(out)[..., None]
    with torch.no_grad():
        stats = statistics(a, visible, call.vis, call.request, shown)
    return Result(out.to(v.dtype), lse, stats)


def statistics(
    a: Tensor, visible: Tensor, vis: Visibility, request: Request, shown: Tensor | None = None
) -> dict[str, Tensor]:
    """Every requested statistic from the whole A, one line of definition each. visible: who counts
    for whom; shown: the keys that an index may name, `visible` if not given."""
    stats: dict[str, Tensor] = {}
    batch, heads, lq, lk = a.shape
    rows = vis.row_set()[:, None, :, None]
    a, visible, shown = a * rows, visible & rows, (visible if shown is None else shown) & rows
    distance = (vis.q_slots(0, lq)[:, None] - vis.k_slots(0, lk)).abs().to(a.dtype)
    if "entropy" in request.names:
        stats["entropy"] = torch.special.entr(a).sum(-1)
    if "max" in request.names:
        stats["max"] = a.amax(-1) if lk else a.sum(-1)  # of no keys: 0
    if "argmax" in request.names:
        # a column more, below all: so there is a largest where there are no keys
        padded = torch.nn.functional.pad(a.masked_fill(~shown, -1.0), (0, 1), value=-2.0)
        stats["argmax"] = padded.argmax(-1).masked_fill(~shown.any(-1), -1)
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
        stats[f"received:{name}"], stats[f"received_count:{name}"] = _received(
            a, visible, vis, question
        )
    if request.topk:
        n = min(request.topk, lk)
        prob, index = a.masked_fill(~shown, -1.0).topk(n, dim=-1)
        stats["topk_index"] = torch.nn.functional.pad(
            index.masked_fill(prob < 0, -1), (0, request.topk - n), value=-1
        )
        stats["topk_prob"] = torch.nn.functional.pad(prob.clamp_min(0), (0, request.topk - n))
        choose_rows(stats, request)
    return stats


def _received(
    a: Tensor, visible: Tensor, vis: Visibility, question: Received
) -> tuple[Tensor, Tensor]:
    """What the columns receive of A by one question, and from how many queries."""
    counted = visible & vis.row_set(question.queries)[:, None, :, None]
    if question.band is not None:
        counted = counted & vis.band(question.band, 0, vis.lq, 0, vis.lk)
    count = counted.sum(-2)
    highest = question.reduce == "max" and vis.lq > 0
    received = (a * counted).amax(-2) if highest else (a * counted).sum(-2)
    received = received / count.clamp_min(1) if question.reduce == "mean" else received
    per_head = vis.mask.dense is not None and vis.mask.dense.shape[1] > 1
    return pick(received, question.keys), count if per_head else count[:, :1]


def choose_rows(stats: dict[str, Tensor], request: Request) -> None:
    """Keeps the top-k keys of `request.topk_rows` only."""
    if request.topk_rows is not None:
        for name in ("topk_index", "topk_prob"):
            stats[name] = stats[name].index_select(2, request.topk_rows.to(stats[name].device))


def pick(received: Tensor, keys: Tensor | None) -> Tensor:
    """(batch, heads, n): the asked columns of (batch, heads, keys), 0 for −1; all of them for
    None."""
    if keys is None:
        return received
    keys = keys.to(received.device).expand(*received.shape[:2], -1)
    return received.gather(-1, keys.clamp_min(0)) * (keys >= 0)
