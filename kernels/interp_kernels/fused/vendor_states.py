"""cuDNN's and FlashAttention's fused calls on CUDA, with the log-sum-exp that torch keeps
private, and FlashAttention 4 where it is installed.

The two align a causal mask differently where there are more keys than queries: cuDNN (as torch
means it) at the top left, FlashAttention 2.1 and later at the bottom right. So a causal call is
made of a square alone, where both agree: `VendorCall`s go through `flash`, which holds that, and
`trusted` looks at squares and full calls on and off the lengths vendors are tuned for before the
first use. `VENDORS` may be replaced, by emulations on a CPU for instance.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..call import Call
from ..masking import Visibility
from ..request import Mask
from ..streaming.spans import Flash
from . import vendor_flex
from .forward import forward

#: Fewer keys are our own kernel's: the vendors' are tuned for long ones; and so are so few rows,
#: which some cuDNN versions refuse.
SHORT, FEW_ROWS = 128, 16

#: (q, k, v, causal, scale) → out (batch, heads, queries, d_v) and its natural log-sum-exp, in as
#: many elements as out has rows.
VendorCall = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Vendor:
    """A fused call of another library; `refuses` (q, k, v, causal) says why it does not take such
    tensors, "" if it does."""

    name: str
    call: VendorCall
    refuses: Callable[[Tensor, Tensor, Tensor, bool], str]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    call = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = call(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    call = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = call(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _params(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> torch.backends.cuda.SDPAParams:
    """What torch's own checks are told: this very call."""
    return torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1])


def _cudnn_refuses(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    if not q.is_cuda:
        return f"they are on {q.device.type}"
    if why := cudnn_guard(
        torch.cuda.get_device_capability(q.device),
        torch.backends.cudnn.version() or 0,
        torch.version.cuda or "",
        (q.shape[1], k.shape[1]),
    ):
        return why
    can = torch.backends.cuda.can_use_cudnn_attention(_params(q, k, v, causal), False)
    return "" if can else "torch says that it cannot take them"


def _flash_refuses(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    if not q.is_cuda:
        return f"they are on {q.device.type}"
    can = torch.backends.cuda.can_use_flash_attention(_params(q, k, v, causal), False)
    return "" if can else "torch says that it cannot take them"


def cudnn_guard(
    capability: tuple[int, int], version: int, cuda: str, heads: tuple[int, int]
) -> str:
    """Why cuDNN's attention is not to be relied on, "" if it is: torch's own conditions for
    preferring it (`check_prefer_cudnn_attention`), and what is known since.

    cuDNN up to 9.15.0 is wrong where a length is no multiple of 128 (pytorch #169849); wheels for
    CUDA 12 are held to minors 0 and 3 of capabilities 9 and 10. On capability 10 models with fewer
    than 8 kv heads get wrong outputs up to cuDNN 9.20 at least (pytorch #193893, open).
    """
    major, minor = capability
    if os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":
        return "TORCH_CUDNN_SDPA_DEPRIORITIZED is set"
    if major not in (9, 10):
        return f"capability {major}.{minor} is not one that torch prefers it on"
    if cuda.partition(".")[0] == "12" and minor not in (0, 3):
        return f"capability {major}.{minor} wants CUDA 13"
    if version <= 91500:
        return f"its version {version} is wrong for lengths off multiples of 128"
    if major == 10 and heads[1] < min(8, heads[0]):
        return "fewer than 8 kv heads are wrong on capability 10"
    return ""


#: Fastest first on Hopper: cuDNN is some 1.5 times faster than FlashAttention 2 there.
VENDORS = (
    Vendor("cuDNN", _cudnn, _cudnn_refuses),
    Vendor("FlashAttention 4", vendor_flex.call, vendor_flex.refuses),
    Vendor("FlashAttention", _flash, _flash_refuses),
)


def _vendor(name: str) -> Vendor:
    return next(one for one in VENDORS if one.name == name)


def _cannot(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why no vendor takes such tensors, wherever they are; "" if one may."""
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        return f"vendor calls take 16-bit tensors, not {q.dtype}"
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > 256:
        return f"vendor calls do not take head dimensions {q.shape[3]} and {v.shape[3]}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "vendor calls want each head's vector contiguous"
    return ""


def name_of(q: Tensor, k: Tensor, v: Tensor, kinds: tuple[bool, ...] = (True,)) -> tuple[str, str]:
    """("cuDNN" | "FlashAttention" | "", why not): the fused call that takes these tensors and is
    known to be right.

    kinds: what the route is going to call: a causal square (True), of as many keys as queries, or
    all keys in full (False).
    """
    if why := _cannot(q, k, v):
        return "", why
    reasons = []
    for one in VENDORS:
        why = ""
        for causal in kinds:
            n = min(q.shape[2], k.shape[2]) if causal else k.shape[2]
            rows = q[:, :, :n] if causal else q
            why = why or one.refuses(rows, k[:, :, :n], v[:, :, :n], causal)
        if not why:
            if trusted(one.name, q.dtype, q.shape[3], q.shape[1] != k.shape[1], q.device):
                return one.name, ""
            why = "its private call does not give what is expected of it here"
        reasons.append((one.name, why))
    same = len({why for _, why in reasons}) == 1
    said = reasons[0][1] if same else "; ".join(f"{name}: {why}" for name, why in reasons)
    return "", f"no vendor call takes these tensors ({said})"


#: (queries, keys, causal) of the calls that are looked at before a vendor is trusted: on and off
#: multiples of 128, square, wide and tall.
_TRIALS = (
    (128, 128, True),
    (128, 128, False),
    (203, 203, True),
    (77, 333, False),
    (333, 203, False),
)


def trusted(
    name: str, dtype: torch.dtype, d: int, grouped: bool, device: torch.device | int | None
) -> bool:
    """Whether the private call gives what we take it to give, on this machine: checked once, on
    small inputs."""
    if not isinstance(device, torch.device):
        device = torch.device("cuda" if device is None else f"cuda:{device}")
    return _passes(_vendor(name), dtype, d, grouped, device)


@lru_cache
def _passes(
    vendor: Vendor, dtype: torch.dtype, d: int, grouped: bool, device: torch.device
) -> bool:
    generator = torch.Generator(device).manual_seed(0)
    kv_heads, scale = 4 if grouped else 8, d**-0.5
    for lq, lk, causal in _TRIALS:
        q, k, v = (
            torch.randn(1, n, h, d, generator=generator, device=device, dtype=torch.float32)
            .to(dtype)
            .transpose(1, 2)
            for n, h in ((lq, 8), (lk, kv_heads), (lk, kv_heads))
        )
        try:
            out, lse = vendor.call(q, k, v, causal, scale)
        except RuntimeError:  # this build or device refuses it
            return False
        keys, values = (x.float().repeat_interleave(8 // kv_heads, 1) for x in (k, v))
        s = scale * (q.float() @ keys.transpose(-1, -2))
        if causal:
            hidden = torch.ones(lq, lk, dtype=torch.bool, device=device).triu(1)
            s = s.masked_fill(hidden, -torch.inf)
        want = s.softmax(-1) @ values
        if lse.numel() != s[..., 0].numel() or out.shape != want.shape:
            return False
        far = (lse.reshape(1, 8, lq) - s.logsumexp(-1)).abs().max()
        # NaN is not near either
        if not (far <= 1e-2 and (out - want).abs().max() <= 3e-2):
            return False
    return True


def flash(name: str, scale: float) -> Flash:
    """The named call as `spans` wants it: (q, k, v, causal, keys) → (out, natural lse (batch,
    heads, queries)). Raises `ValueError` for a causal call that is not a square, whose alignment
    vendors do not agree on."""
    vendor = _vendor(name)

    def call(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, keys: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if keys is not None:  # a bias would be (queries, keys)
            raise ValueError("Vendor calls take no padding; our own kernel does.")
        if causal and q.shape[2] != k.shape[2]:
            raise ValueError(
                f"A causal vendor call of {q.shape[2]} queries and {k.shape[2]} keys: vendors "
                "align it differently."
            )
        if k.shape[2] < SHORT or q.shape[2] < FEW_ROWS:
            return _by_our_own(q, k, v, causal, scale)
        try:
            out, lse = vendor.call(q, k, v, causal, scale)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _warn(vendor.name, str(error))
            return _by_our_own(q, k, v, causal, scale)
        return out, lse.reshape(q.shape[:3])

    return call


def _by_our_own(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    mask, (batch, heads, lq, _) = Mask(causal=causal), q.shape
    vis = Visibility(mask, batch, heads, lq, k.shape[2], q.device)
    state = forward(Call(q, k, v, vis, scale))
    return state.out, state.lse


@lru_cache
def _warn(name: str, why: str) -> None:
    """Once a process and reason."""
    warnings.warn(f"{name} refused a call, which our own kernel answers: {why}", stacklevel=4)
