"""The vendor's fused attention with its log-sum-exp, for the calls it computes correctly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masking import FLOOR, INVISIBLE, Visibility, bias_visible, compute_dtype
from .spans import Flash

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape_of(
    vis: Visibility, q: Tensor, k: Tensor, v: Tensor, softcap: float | None
) -> tuple[str, str]:
    """("square" | "full" | "prefix" | "", why): how the call maps on vendor calls, or "" and why it
    does not."""
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

    square: the causal diagonal of a square; full: every row sees every key; prefix: full on the
    cached keys, square on the rest, merged by their log-sum-exps. `is_causal` is top-left aligned,
    so nothing else may use it.
    """
    mask, lq, lk = vis.mask, vis.lq, vis.lk
    if not lq or not lk:
        return "", "there are no queries or no keys"
    first, last = (
        mask.q_start - mask.k_start,
        mask.q_start - mask.k_start + lq - 1,
    )  # slots relative to column 0
    reach = last if mask.causal else max(abs(last), abs(first - lk + 1))
    if mask.window is not None and reach >= mask.window:
        return (
            "",
            "of the sliding window and the keys kept beyond it"
            if mask.keep_first
            else "of the sliding window",
        )
    if not mask.causal or first >= lk - 1:
        return "full", "every row sees every key"
    if first < 0 or last >= lk:
        return "", f"some queries come {'before the first' if first < 0 else 'after the last'} key"
    return (
        ("square", "plain causal square")
        if first == 0
        else ("prefix", "cached prefix, then a causal square")
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    vis: Visibility,
    shape: str,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, queries, d_v) in v's dtype, lse (batch, heads, queries) natural log; rows
    that see nothing get 0 and −inf. bias (batch or 1, heads or 1, keys) is added to the logits;
    −inf hides the key. For "prefix" the two parts are merged as Σ_g exp(lse_g − lse)·out_g."""
    lq, d_v = q.shape[2], v.shape[3]
    width = max(q.shape[3], d_v)
    # The CPU kernel wants d_v = d: zeros added to q and k change no logit, zeros added to v are cut
    # off again.
    q, k, v = (F.pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (q, k, v))
    added = _added(vis.keys, bias, q)
    if shape == "full":
        out, lse = _call(q, k, v, added, scale, causal=False)
    else:
        # Keys after the last query (a static cache's empty end) are unseen.
        seen = vis.span(0, lq)[1]
        prefix = seen - lq

        def part(a: int, b: int, causal: bool) -> tuple[Tensor, Tensor]:
            return _call(
                q,
                k[:, :, a:b],
                v[:, :, a:b],
                None if added is None else added[..., a:b],
                scale,
                causal,
            )

        out, lse = part(prefix, seen, True)
        if prefix:
            out0, lse0 = part(0, prefix, False)
            total = torch.logaddexp(lse, lse0)
            out = (
                out * (lse - total).exp()[..., None] + out0 * (lse0 - total).exp()[..., None]
            ).to(v.dtype)
            lse = total
    if added is not None:
        # Where all that is seen is hidden, the hidden keys' bias is what is left of the
        # log-sum-exp.
        empty = lse <= FLOOR
        if bool(empty.any()):  # on a CPU looking costs less than writing the output once more
            out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out[..., :d_v], lse


def flash(scale: float) -> Flash:
    """The fused call as `spans` wants it."""
    return lambda q, k, v, causal, keys: _call(q, k, v, _added(keys, None, q), scale, causal=causal)


def _added(keys: Tensor | None, bias: Tensor | None, q: Tensor) -> Tensor | None:
    """What padding and a bias add to the logits, (batch or 1, heads or 1, 1, keys) for all rows;
    None for nothing. Finite: with −inf the backward of a row that sees nothing is NaN, and its
    log-sum-exp is returned as 0."""
    if keys is None and bias is None:
        return None
    dtype = compute_dtype(q)  # the call takes a float32 bias beside half inputs
    made = torch.zeros((), dtype=dtype, device=q.device)
    if bias is not None:
        made = torch.where(bias_visible(bias), bias, INVISIBLE).to(q.device, dtype)
    if keys is not None:
        made = torch.where(keys[:, None], made, INVISIBLE)
    return made[:, :, None]


def _call(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """One fused call; the bias is the same for all rows, and costs nothing."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )


def add_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A sink logit per head takes its share of the softmax and gives no value: out·exp(lse − lse'),
    lse' = ln(e^lse + e^sink). Rows that see nothing stay at 0 and −inf."""
    empty = lse <= FLOOR
    safe = lse.masked_fill(empty, 0.0)  # −inf beside a sink of −inf would be NaN
    with_sink = torch.logaddexp(safe, sinks.to(lse)[None, :, None])
    gain = (safe - with_sink).exp()
    return (out * gain[..., None]).to(out.dtype), with_sink.masked_fill(empty, -torch.inf)
