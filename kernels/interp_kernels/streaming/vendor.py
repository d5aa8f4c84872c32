"""The vendor's fused attention with its log-sum-exp, for the calls it computes correctly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call
from ..looking import may_look
from ..masking import FLOOR, INVISIBLE, Visibility, bias_visible, compute_dtype
from .flash_gradients import FUSED
from .flash_gradients import Flash as Differentiable
from .spans import Flash, padded

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Devices whose fused call gives its log-sum-exp here.
WIRED = ("cpu",)


def shape_of(call: Call) -> tuple[str, str]:
    """("square" | "full" | "prefix" | "", why): how the call maps on vendor calls, or "" and why it
    does not."""
    q = call.q
    if call.softcap is not None:
        return "", "of soft-capped logits"
    if call.mask.dense is not None:
        return "", "of the dense mask"
    if q.device.type not in WIRED:
        return "", f"no vendor call with a log-sum-exp is wired on {q.device.type}"
    dtype = q.dtype
    if dtype not in _DTYPES or dtype != call.k.dtype or dtype != call.v.dtype:
        return "", f"of the dtypes {dtype}, {call.k.dtype}, {call.v.dtype}"
    return geometry(call.vis)


def geometry(vis: Visibility) -> tuple[str, str]:
    """As `shape_of`, by causality, window and offsets alone; any device.

    square: the causal diagonal of a square; full: every row sees every key; prefix: full on the
    cached keys, square on the rest, merged by their log-sum-exps. `is_causal` is top-left aligned,
    so nothing else may use it.
    """
    mask, lq, lk = vis.mask, vis.lq, vis.lk
    if not lq or not lk:
        return "", "there are no queries or no keys"
    first = mask.q_start - mask.k_start  # slots relative to column 0
    last = first + lq - 1
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


def attend(call: Call, shape: str, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out (batch, heads, queries, d_v) in v's dtype, lse (batch, heads, queries) natural log; rows
    that see nothing get 0 and −inf. bias (batch or 1, heads or 1, keys) is added to the logits;
    −inf hides the key. For "prefix" the two parts are merged as Σ_g exp(lse_g − lse)·out_g."""
    q, k, v, scale = call.q, call.k, call.v, call.scale
    keys, d, d_v = call.vis.keys, q.shape[3], v.shape[3]
    if d != d_v:
        # The CPU kernel wants d_v = d: zeros added to q and k change no logit, zeros added to v are
        # cut off again.
        q, k, v = padded(q, k, v)
    added = None if keys is None and bias is None else _added(keys, bias, q)
    if shape == "full":
        out, lse = _call(q, k, v, added, scale, causal=False)
    else:
        out, lse = _square(q, k, v, added, scale, call.vis)
    if added is not None:
        # Where all that is seen is hidden, the hidden keys' bias is what is left of the
        # log-sum-exp.
        empty = lse <= FLOOR
        # on a CPU looking costs less than writing the output once more
        if not may_look(empty.device) or bool(empty.any()):
            out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out if d == d_v else out[..., :d_v], lse


def _square(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float, vis: Visibility
) -> tuple[Tensor, Tensor]:
    """The causal square of the last keys that are seen, merged with the whole of those before."""
    # Keys after the last query (a static cache's empty end) are unseen.
    seen = vis.span(0, vis.lq)[1]
    prefix = seen - vis.lq

    def part(a: int, b: int, causal: bool) -> tuple[Tensor, Tensor]:
        bias = None if added is None else added[..., a:b]
        return _call(q, k[:, :, a:b], v[:, :, a:b], bias, scale, causal)

    out, lse = part(prefix, seen, True)
    if prefix:
        out0, lse0 = part(0, prefix, False)
        total = torch.logaddexp(lse, lse0)
        out = (out * (lse - total).exp()[..., None] + out0 * (lse0 - total).exp()[..., None]).to(
            v.dtype
        )
        lse = total
    return out, lse


def flash(scale: float) -> Flash:
    """The fused call as `spans` wants it."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, keys: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _call(q, k, v, None if keys is None else _added(keys, None, q), scale, causal)

    return call


def _added(keys: Tensor | None, bias: Tensor | None, q: Tensor) -> Tensor:
    """What padding and a bias add to the logits, (batch or 1, heads or 1, 1, keys) for all rows.
    Finite: with −inf the backward of a row that sees nothing is NaN, and its log-sum-exp is
    returned as 0."""
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
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if (
        scale <= 0
    ):  # PyTorch's kernel multiplies hidden logits by it too: −∞ · −1 is no longer hidden
        q, scale = q * scale, 1.0
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return Differentiable.apply(q, k, v, bias, scale, causal)
    return FUSED(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)


def add_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A sink logit per head takes its share of the softmax and gives no value: out·exp(lse − lse'),
    lse' = ln(e^lse + e^sink). Rows that see nothing stay at 0 and −inf."""
    empty = lse <= FLOOR
    safe = lse.masked_fill(empty, 0.0)  # −inf beside a sink of −inf would be NaN
    with_sink = torch.logaddexp(safe, sinks.to(lse)[None, :, None])
    gain = (safe - with_sink).exp()
    return (out * gain[..., None]).to(out.dtype), with_sink.masked_fill(empty, -torch.inf)
