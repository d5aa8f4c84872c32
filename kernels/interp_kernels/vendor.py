"""The vendor's fused attention with its log-sum-exp, for the calls it computes correctly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .masking import FLOOR, INVISIBLE, Visibility
from .spans import Flash

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape_of(vis: Visibility, q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> tuple[str, str]:
    """("square" | "full" | "prefix" | "", why): how the call maps on vendor calls, or "" and why it does not."""
    mask = vis.mask
    if softcap is not None:
        return "", "of soft-capped logits"
    if mask.dense is not None:
        return "", "of the dense mask"
    if q.device.type != "cpu":
        return "", f"no vendor call with a log-sum-exp is wired on {q.device.type}"
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        return "", f"of the dtypes {q.dtype}, {k.dtype}, {v.dtype}"
    return geometry(vis)


def geometry(vis: Visibility) -> tuple[str, str]:
    """As `shape_of`, by causality, window and offsets alone; any device.

    square: the causal diagonal of a square; full: every row sees every key; prefix: full on the cached keys, square
    on the rest, merged by their log-sum-exps. `is_causal` is top-left aligned, so nothing else may use it.
    """
    mask, lq, lk = vis.mask, vis.lq, vis.lk
    if not lq or not lk:
        return "", "there are no queries or no keys"
    first, last = mask.q_start - mask.k_start, mask.q_start - mask.k_start + lq - 1  # slots relative to column 0
    reach = last if mask.causal else max(abs(last), abs(first - lk + 1))
    if mask.window is not None and reach >= mask.window:
        return "", "of the sliding window and the keys kept beyond it" if mask.keep_first else "of the sliding window"
    if not mask.causal or first >= lk - 1:
        return "full", "every row sees every key"
    if first < 0:
        return "", "some queries come before the first key"
    return ("square", "plain causal square") if first == 0 else ("prefix", "cached prefix, then a causal square")


def attend(q: Tensor, k: Tensor, v: Tensor, *, vis: Visibility, shape: str, scale: float) -> tuple[Tensor, Tensor]:
    """out (batch, heads, queries, d_v) in v's dtype, lse (batch, heads, queries) natural log; rows that see nothing
    get 0 and −inf. For "prefix" the two parts are merged as Σ_g exp(lse_g − lse)·out_g."""
    lq, d_v = q.shape[2], v.shape[3]
    width = max(q.shape[3], d_v)
    # The CPU kernel wants d_v = d: zeros added to q and k change no logit, zeros added to v are cut off again.
    q, k, v = (F.pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (q, k, v))
    if shape == "full":
        out, lse = _call(q, k, v, vis.keys, scale, causal=False)
    else:
        # Keys after the last query (a static cache's empty end) are unseen.
        seen = vis.span(0, lq)[1]
        prefix, keys = seen - lq, vis.keys
        square = None if keys is None else keys[:, prefix:seen]
        out, lse = _call(q, k[:, :, prefix:seen], v[:, :, prefix:seen], square, scale, causal=True)
        if prefix:
            cached = None if keys is None else keys[:, :prefix]
            out0, lse0 = _call(q, k[:, :, :prefix], v[:, :, :prefix], cached, scale, causal=False)
            total = torch.logaddexp(lse, lse0)
            out = (out * (lse - total).exp()[..., None] + out0 * (lse0 - total).exp()[..., None]).to(v.dtype)
            lse = total
    if vis.keys is not None:
        empty = (vis.row_counts() == 0)[:, None]
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out[..., :d_v], lse


def flash(scale: float) -> Flash:
    """The fused call as `spans` wants it."""
    return lambda q, k, v, causal, keys: _call(q, k, v, keys, scale, causal=causal)


def _call(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """One fused call; padding goes in as a broadcast (batch, 1, 1, keys) bias. The bias is finite: with −inf the
    backward of a row that sees nothing is NaN, and its log-sum-exp is returned as 0."""
    bias = None
    if keys is not None:
        hidden = max(INVISIBLE, torch.finfo(q.dtype).min / 2)
        bias = torch.zeros(keys.shape, dtype=q.dtype, device=q.device).masked_fill(~keys, hidden)[:, None, None]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)


def add_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A sink logit per head takes its share of the softmax and gives no value: out·exp(lse − lse'), lse' = ln(e^lse
    + e^sink). Rows that see nothing stay at 0 and −inf."""
    empty = lse <= FLOOR
    safe = lse.masked_fill(empty, 0.0)  # −inf beside a sink of −inf would be NaN
    with_sink = torch.logaddexp(safe, sinks.to(lse)[None, :, None])
    gain = (safe - with_sink).exp()
    return (out * gain[..., None]).to(out.dtype), with_sink.masked_fill(empty, -torch.inf)
