"""The one entry point: which backend computes a call."""

from __future__ import annotations

from torch import Tensor

from . import reference, streaming
from .spec import Mask, Request, Result

BACKENDS = ("reference", "streaming", "triton")


class BackendError(ValueError):
    """The backend asked for does not exist or cannot serve this call."""


def _check(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError("q, k and v must be (batch, heads, tokens, dim).")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"Shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}.")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key-value heads evenly.")
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}, expected ({q.shape[1]},): a logit a query head.")


def _resolve(backend: str) -> str:
    if backend == "auto":
        return "streaming"
    if backend == "triton":
        raise BackendError("The triton backend is not available here; use backend='streaming' or 'auto'.")
    if backend not in BACKENDS:
        raise BackendError(f"There is no backend {backend!r}; there are auto, {', '.join(BACKENDS)}.")
    return backend


def check_backend(backend: str) -> None:
    """Raise `BackendError` if `backend` does not exist or cannot be used here."""
    _resolve(backend)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    request: Request | None = None,
    backend: str = "auto",
) -> Result:
    """Attention, its log-sum-exp and the requested statistics.

    q (batch, heads, queries, d), k (batch, kv_heads, keys, d), v (batch, kv_heads, keys, d_v); query head h reads kv
    head h // (heads // kv_heads). logits = scale·q·k (default d^−½), soft-capped as softcap·tanh(logits/softcap)
    before the mask (default: plain causal); sinks (heads,) are extra logits without a value.
    """
    _check(q, k, v, sinks)
    run = reference.attention if _resolve(backend) == "reference" else streaming.attention
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run(q, k, v, mask=mask or Mask(), scale=scale, softcap=softcap, sinks=sinks, request=request)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    request: Request | None = None,
    backend: str = "auto",
) -> str:
    """Which way `attention` would compute this call, and why; nothing is computed."""
    _check(q, k, v, sinks)
    if _resolve(backend) == "reference":
        return "reference: eager, the whole attention matrix"
    return streaming.explain_route(
        q, k, v, mask=mask or Mask(), softcap=softcap, sinks=sinks, request=request or Request()
    )
