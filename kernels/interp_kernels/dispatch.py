"""The one entry point: which backend computes a call.

`auto` takes the fused kernels (`triton`) wherever they can run and serve the call, and PyTorch
(`streaming`) elsewhere. Asking for a backend that cannot serve a call is an error, never a silent
fallback; `explain` says what would run.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference
from .call import Call, Settings, prepare
from .compose import refuse
from .request import Result
from .streaming import route as streaming

if TYPE_CHECKING:
    from typing_extensions import Unpack

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


def _plans(backend: str, q: Tensor) -> ModuleType | None:
    """What keeps plans of decode steps, where the kernels come first; a graph that is being
    compiled keeps its own."""
    if backend != "triton" and not (backend == "auto" and q.is_cuda):
        return None
    if torch.compiler.is_compiling() or _fused() is None:
        return None
    from .fused import plans

    return plans


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist or cannot be used on this machine.

    Args:
        backend: "auto", "reference", "streaming" or "triton".

    Raises:
        BackendError: saying which there are, or why this one is not available.

    Example:
        >>> check_backend("streaming")
        >>> check_backend("cuda")
        Traceback (most recent call last):
        ...
        interp_kernels.dispatch.BackendError: There is no backend 'cuda'; there are auto, \
reference, streaming, triton.
    """
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


def _on_gpu(call: Call) -> bool:
    """Whether `auto` asks the kernels first."""
    return call.q.is_cuda


def _resolve(backend: str, call: Call) -> tuple[str, str]:
    """(backend, why not triton): raises `BackendError` if the one asked for cannot serve the
    call."""
    if backend == "auto" and not _on_gpu(call):
        return "streaming", ""
    if backend not in ("auto", *BACKENDS):
        check_backend(backend)
    if backend in ("reference", "streaming"):
        return backend, ""
    fused = _fused()
    reason = "the package triton is not installed" if fused is None else fused.why_not(call)
    if backend == "triton" and reason:
        raise BackendError(
            f"The triton backend cannot serve this call: {reason}; use backend='streaming' or "
            "'auto'."
        )
    return ("streaming", reason) if reason else ("triton", "")


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **settings: Unpack[Settings]
) -> Result:
    """Attention, its log-sum-exp and the requested statistics, of the weights as edited.

    Args:
        q: queries (batch, heads, queries, d); head h reads key-value head h // (heads // kv_heads).
        k: keys (batch, kv_heads, keys, d).
        v: values (batch, kv_heads, keys, d_v).
        backend: "auto", "reference", "streaming" or "triton".
        mask: `Mask`, which keys each query sees; default plain causal.
        scale: logits = scale·q·k; default d^−½.
        softcap: logits become softcap·tanh(logits / softcap), before the mask.
        sinks: (heads,) extra logits without a value.
        request: `Request`, the statistics wanted.
        steer: `Steer`, or several that act one after the other.

    Returns:
        The output, its log-sum-exp and the statistics by name.

    Raises:
        ValueError: naming the argument whose shape, type or device does not fit.
        BackendError: if the backend does not exist or cannot serve the call.

    Example:
        >>> q = k = torch.zeros(1, 1, 2, 4)
        >>> v = torch.tensor([[[[1.0], [3.0]]]])
        >>> attention(q, k, v).out.flatten()
        tensor([1., 2.])
    """
    plans = _plans(backend, q)
    step = None
    if plans is not None:
        step = plans.Step(q, k, v, settings)
        if (known := step.answer()) is not None:
            return known
    call = prepare(q, k, v, fuse=backend != "reference", **settings)
    name, _ = _resolve(backend, call)
    refuse(call.steers, call.sinks, call.request)
    if name == "streaming":
        return streaming.attention(call)
    if name == "reference":
        return reference.attention(call)
    fused = _fused()
    assert fused is not None
    try:
        result = fused.attention(call)
        if step is not None:
            step.learn(call)
        return result
    except fused.DoesNotRun as error:  # once a configuration; from then on `why_not` has it
        if plans is not None:
            plans.forget()
        if backend == "triton":
            raise BackendError(
                f"The triton backend cannot serve this call: {error}; use backend='streaming' or "
                "'auto'."
            ) from error
        warnings.warn(
            f"Attention goes the streaming way from here on: {error}.", RuntimeWarning, stacklevel=2
        )
    return streaming.attention(call)


def explain(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **settings: Unpack[Settings]
) -> str:
    """Which way `attention` would compute this call, and why; nothing is computed.

    Args:
        q: queries, as `attention` takes them.
        k: keys.
        v: values.
        backend: "auto", "reference", "streaming" or "triton".
        settings: mask, scale, softcap, sinks, request and steer, as in `attention`.

    Returns:
        One line: the backend, its way and the reason.

    Raises:
        ValueError: naming the argument whose shape, type or device does not fit.
        BackendError: if the backend does not exist or cannot serve the call.

    Example:
        >>> q = torch.zeros(1, 1, 2, 4)
        >>> explain(q, q, q)
        'streaming: vendor SDPA (plain causal square)'
    """
    call = prepare(q, k, v, fuse=backend != "reference", **settings)
    name, reason = _resolve(backend, call)
    if name == "reference":
        return "reference: eager, the whole attention matrix"
    if name == "triton":
        fused = _fused()
        assert fused is not None
        return fused.explain_route(call)
    line = streaming.explain_route(call)
    return f"{line}; not triton: {reason}" if reason else line
