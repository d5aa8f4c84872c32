"""The one entry point: which backend computes a call.

`auto` takes the fused kernels (`triton`) wherever they can run and serve the call, and PyTorch
(`streaming`) elsewhere. Asking for a backend that cannot serve a call is an error, never a silent
fallback; `explain` says what would run.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import compose, reference
from .compose import Steers
from .masking import Visibility
from .request import Mask, Request, Result
from .streaming import route as streaming

BACKENDS = ("reference", "streaming", "triton")


class BackendError(ValueError):
    """The backend asked for does not exist or cannot serve this call."""


@lru_cache
def _fused() -> ModuleType | None:
    """The kernels, imported on first need; None where there is no Triton (macOS, say)."""
    if find_spec("triton") is None:
        return None
    from .fused import backend

    return backend


def check_backend(backend: str) -> None:
    """Raise `BackendError` if `backend` does not exist or cannot be used on this machine."""
    if backend not in ("auto", *BACKENDS):
        raise BackendError(
            f"There is no backend {backend!r}; there are auto, {', '.join(BACKENDS)}."
        )
    if backend == "triton":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if reason := _unusable(device):
            raise BackendError(
                f"The triton backend is not available here: {reason}; use 'streaming' or 'auto'."
            )


def _unusable(device: torch.device) -> str:
    fused = _fused()
    return "the package triton is not installed" if fused is None else fused.usable(device)


def _same(argument: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{argument} is on {value.device}, q on {like.device}; move one of them.")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    sinks: Tensor | None,
    request: Request | None,
    steer: Steers,
) -> None:
    """Raise `ValueError` naming the argument that does not fit, before anything is computed."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be (batch, heads, tokens, dim)."
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; attention takes floating-point tensors.")
        _same(name, x, q)
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"Shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key-value heads evenly."
        )
    (batch, heads, lq, _), lk = q.shape, k.shape[2]
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(
            f"sinks has shape {tuple(sinks.shape)}, expected ({heads},): a logit a query head."
        )
    Visibility(mask, batch, heads, lq, lk, q.device)
    if request is not None:
        _check_request(request, batch, heads, lq, lk)
    compose.check(steer, batch, heads, lq, lk)


def _check_request(request: Request, batch: int, heads: int, lq: int, lk: int) -> None:
    if request.labels is not None:
        if tuple(request.labels.shape) != (batch, lk):
            raise ValueError(
                f"request.labels has shape {tuple(request.labels.shape)}, expected {(batch, lk)}."
            )
        if request.labels.is_floating_point():
            raise ValueError(
                f"request.labels are {request.labels.dtype}; they must be integers, a group a key."
            )
    if request.topk_rows is not None:
        shape = tuple(request.topk_rows.shape)
        if len(shape) != 1 or request.topk_rows.is_floating_point():
            raise ValueError(
                f"request.topk_rows is {request.topk_rows.dtype} {shape}; it must list query rows, "
                "(m,)."
            )
        _in_range("request.topk_rows", request.topk_rows, lq, "query rows")
    for name, index in request.pairs.items():
        shapes = [(b, n) for b in (1, batch) for n in (1, lq)]
        if index.ndim != 3 or tuple(index.shape[:2]) not in shapes:
            raise ValueError(
                f"pair {name!r} has shape {tuple(index.shape)}, expected ({batch}, {lq} or 1, m) "
                "columns."
            )
        _in_range(f"pair {name!r}", index, lk)
    for name, question in request.received.items():
        if question.queries is not None and tuple(question.queries.shape) != (batch, lq):
            shape = tuple(question.queries.shape)
            raise ValueError(
                f"received {name!r}: queries has shape {shape}, expected {(batch, lq)}."
            )
        if question.keys is not None:
            shape = tuple(question.keys.shape)
            if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, heads):
                raise ValueError(
                    f"received {name!r}: keys has shape {shape}, expected ({batch}, {heads} or 1, "
                    "n)."
                )
            _in_range(f"received {name!r}: keys", question.keys, lk)
        if question.reduce not in ("mean", "sum", "max"):
            raise ValueError(
                f"received {name!r}: reduce is {question.reduce!r}; it is mean, sum or max."
            )


def _in_range(what: str, index: Tensor, limit: int, of: str = "keys") -> None:
    """A number past the last is an error. On a GPU looking would wait for the device, so there it
    is not looked at."""
    if (
        index.device.type == "cpu"
        and index.numel()
        and type(index) is Tensor
        and int(index.max()) >= limit
    ):
        raise ValueError(
            f"{what} lists number {int(index.max())}, and there are {limit} {of}, from 0."
        )


def _resolve(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    sinks: Tensor | None,
    request: Request | None,
    steer: Steers,
) -> tuple[str, str]:
    """(backend, why not triton): raises `BackendError` if the one asked for cannot serve the
    call."""
    if backend not in ("auto", *BACKENDS):
        check_backend(backend)
    if backend in ("reference", "streaming") or (backend == "auto" and not q.is_cuda):
        return ("reference", "") if backend == "reference" else ("streaming", "")
    fused = _fused()
    if fused is None:
        reason = "the package triton is not installed"
    else:
        reason = fused.why_not(
            q, k, v, mask=mask, scale=scale, sinks=sinks, request=request, steer=steer
        )
    if backend == "triton" and reason:
        raise BackendError(
            f"The triton backend cannot serve this call: {reason}; use backend='streaming' or "
            "'auto'."
        )
    return ("streaming", reason) if reason else ("triton", "")


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
    steer: Steers = None,
    backend: str = "auto",
) -> Result:
    """Attention, its log-sum-exp and the requested statistics, edited by `steer`, or by several one
    after the other.

    q (batch, heads, queries, d), k (batch, kv_heads, keys, d), v (batch, kv_heads, keys, d_v);
    query head h reads kv head h // (heads // kv_heads). logits = scale·q·k (default d^−½),
    soft-capped as softcap·tanh(logits/softcap) before the mask (default: plain causal); sinks
    (heads,) are extra logits without a value. Statistics are of the weights after the edit.

    Raises `ValueError` naming the argument whose shape, type or device does not fit; `BackendError`
    if `backend` ("auto", "reference", "streaming", "triton") cannot serve the call.
    """
    mask = mask or Mask()
    _check(q, k, v, mask, sinks, request, steer)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend != "reference":
        steer = compose.fuse(steer, k.shape[2], q.device)
    name, _ = _resolve(backend, q, k, v, mask, scale, sinks, request, steer)
    if name == "triton":
        fused = _fused()
        assert fused is not None
        run = fused.attention
    else:
        run = reference.attention if name == "reference" else streaming.attention
    return run(
        q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, request=request, steer=steer
    )


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    request: Request | None = None,
    steer: Steers = None,
    backend: str = "auto",
) -> str:
    """Which way `attention` would compute this call, and why; nothing is computed."""
    mask = mask or Mask()
    _check(q, k, v, mask, sinks, request, steer)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend != "reference":
        steer = compose.fuse(steer, k.shape[2], q.device)
    name, reason = _resolve(backend, q, k, v, mask, scale, sinks, request, steer)
    if name == "reference":
        return "reference: eager, the whole attention matrix"
    if name == "triton":
        fused = _fused()
        assert fused is not None
        return fused.explain_route(
            q,
            k,
            v,
            mask=mask,
            softcap=softcap,
            sinks=sinks,
            request=Request() if request is None else request,
            steer=steer,
        )
    line = streaming.explain_route(
        q,
        k,
        v,
        mask=mask,
        softcap=softcap,
        sinks=sinks,
        request=Request() if request is None else request,
        steer=steer,
    )
    return f"{line}; not triton: {reason}" if reason else line
