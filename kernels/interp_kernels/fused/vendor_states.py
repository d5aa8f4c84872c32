"""cuDNN's and FlashAttention's fused calls on CUDA, with the log-sum-exp that torch keeps
private."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..call import Call
from ..masking import Visibility
from ..request import Mask
from ..streaming.spans import Flash
from .forward import forward

#: Fewer keys are our own kernel's: the vendors' are tuned for long ones.
SHORT = 128


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    call = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = call(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    call = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = call(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


#: Fastest first on Hopper: cuDNN is some 1.5 times faster than FlashAttention 2 there.
_CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]] = {
    "cuDNN": _cudnn,
    "FlashAttention": _flash,
}


def name_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, str]:
    """("cuDNN" | "FlashAttention" | "", why not): the fused call that takes these tensors and is
    known to be right.

    Both align causality top-left, so only square causal calls and full ones may use them.
    """
    if not q.is_cuda:
        return "", f"no vendor call with a log-sum-exp is wired on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        return "", f"vendor calls take 16-bit tensors, not {q.dtype}"
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > 256:
        return "", f"vendor calls do not take head dimensions {q.shape[3]} and {v.shape[3]}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "", "vendor calls want each head's vector contiguous"
    cuda = torch.backends.cuda
    grouped = q.shape[1] != k.shape[1]
    params = cuda.SDPAParams(q, k, v, None, 0.0, False, grouped)
    for name, can in (
        ("cuDNN", cuda.can_use_cudnn_attention),
        ("FlashAttention", cuda.can_use_flash_attention),
    ):
        if can(params, False) and trusted(name, q.dtype, q.shape[3], grouped, q.device.index):
            return name, ""
    return "", "no vendor call takes these tensors"


@lru_cache
def trusted(name: str, dtype: torch.dtype, d: int, grouped: bool, index: int | None) -> bool:
    """Whether the private call gives what we take it to give, on this machine: checked once, on a
    small input."""
    device = torch.device("cuda" if index is None else f"cuda:{index}")
    generator = torch.Generator(device).manual_seed(0)
    heads = 2 if grouped else 4
    q, k, v = (
        torch.randn(1, 128, h, d, generator=generator, device=device, dtype=torch.float32)
        .to(dtype)
        .transpose(1, 2)
        for h in (4, heads, heads)
    )
    for causal in (False, True):
        try:
            out, lse = _CALLS[name](q, k, v, causal, d**-0.5)
        except RuntimeError:  # this build or device refuses it
            return False
        s = d**-0.5 * (q.float() @ k.float().repeat_interleave(4 // heads, 1).transpose(-1, -2))
        if causal:
            s = s.masked_fill(
                torch.ones(128, 128, dtype=torch.bool, device=device).triu(1), -torch.inf
            )
        want = s.softmax(-1) @ v.float().repeat_interleave(4 // heads, 1)
        ok = lse.numel() == s[..., 0].numel() and out.shape == want.shape
        if (
            not ok
            or (lse.reshape(1, 4, 128) - s.logsumexp(-1)).abs().max() > 1e-2
            or (out - want).abs().max() > 3e-2
        ):
            return False
    return True


def flash(name: str, scale: float) -> Flash:
    """The named call as `spans` wants it: (q, k, v, causal, keys) → (out, natural lse (batch,
    heads, queries))."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, keys: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert keys is None  # padding takes our own kernel: a bias would be (queries, keys)
        if k.shape[2] < SHORT:
            mask, (batch, heads, lq, _) = Mask(causal=causal), q.shape
            vis = Visibility(mask, batch, heads, lq, k.shape[2], q.device)
            state = forward(Call(q, k, v, vis, scale))
            return state.out, state.lse
        out, lse = _CALLS[name](q, k, v, causal, scale)
        return out, lse.reshape(q.shape[:3])

    return call
