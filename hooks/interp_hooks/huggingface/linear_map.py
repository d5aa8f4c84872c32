"""The matrix that a module applies, whatever it is made of.

A plain Linear shows it. Of anything else (a LoRA or other adapter around one, quantised or
offloaded weights, parametrisations) it is what the module gives for the unit vectors, once it is
seen to be linear. Quantised layers may round what they read, too (LLM.int8): they are linear up to
that rounding.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch

from interp_hooks.errors import TapError
from interp_hooks.huggingface.shards import sharded, whole_tensor
from interp_hooks.huggingface.split import tolerance

#: whether a projection is run by itself, and not for the model: what is hooked onto it for its part
#: in the model passes over that
alone: ContextVar[bool] = ContextVar("alone", default=False)
#: unit vectors that are run at once
CHUNK = 4096
#: largest difference, relative to the largest number, that a quantised layer's rounding makes
ROUNDING = 5e-2


def stored(module: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """(out, in) weight and bias as a Linear or a GPT-2 Conv1D (which stores it transposed) holds
    them; None where there are none to be read (offloaded, packed)."""
    weight, bias = (whole_tensor(getattr(module, name, None)) for name in ("weight", "bias"))
    for tensor in (weight, bias):
        if tensor is not None and not _readable(tensor):
            return None
    if weight is None or weight.ndim != 2:
        return None
    if any(base.__name__ == "Conv1D" for base in type(module).__mro__):
        weight = weight.T
    return weight.detach(), None if bias is None else bias.detach()


def _readable(tensor: Any) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and not tensor.is_meta
        and tensor.is_floating_point()
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
    )


@torch.no_grad()
def linear_map(module: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, in) matrix and bias of what `module` does to the last dimension of its input.

    Args:
        like: (0, in), an input's width, dtype and device.

    Raises:
        TapError: it is no linear map.
    """
    width = like.shape[1]
    if sharded(module) is not None:  # it runs with all processes only
        shared = stored(module)
        if shared is None or type(module) is not torch.nn.Linear or shared[0].shape[1] != width:
            raise TapError(f"its {type(module).__name__} is shared out over processes")
        return shared
    like = _as_held(module, like)
    generator = torch.Generator().manual_seed(0)
    trial = torch.randn(4, width, generator=generator).to(like)
    wanted = _run(module, trial)
    plain = stored(module)
    if plain is not None and plain[0].shape[1] == width:
        weight, bias = plain
        same_dtype = weight.dtype == like.dtype and weight.device == like.device
        if same_dtype and _same(torch.nn.functional.linear(trial, weight, bias), wanted):
            return weight, bias
    bias = _run(module, torch.zeros(1, width).to(like))[0]
    columns = [
        _run(module, torch.eye(width)[start : start + CHUNK].to(like)) - bias
        for start in range(0, width, CHUNK)
    ]
    weight = torch.cat(columns).T.contiguous()
    close = ROUNDING if _packed(module) else None
    if not _same(torch.nn.functional.linear(trial, weight, bias), wanted, close):
        raise TapError(f"what its {type(module).__name__} does is not linear")
    return weight, bias if bool(bias.any()) else None


def _as_held(module: Any, like: torch.Tensor) -> torch.Tensor:
    """`like` in the type and place that the module's own numbers have now: a model may have been
    converted or moved since it was loaded."""
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    held = (p for p in module.parameters() if p.dtype in plain and not p.is_meta)
    first = next(held, None)
    return like if first is None else like.to(first.device, first.dtype)


def _run(module: Any, rows: torch.Tensor) -> torch.Tensor:
    token = alone.set(True)
    try:
        out = module(rows[:, None])  # (rows, 1, in): some modules expect tokens of a batch
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(rows.shape[0], -1)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise TapError(f"its {type(module).__name__} can't be run by itself ({error})") from error
    finally:
        alone.reset(token)


def _packed(module: Any) -> bool:
    """Whether a layer inside holds its weights in fewer bits."""
    weights = (getattr(part, "weight", None) for part in module.modules())
    return any(
        isinstance(w, torch.Tensor)
        and (not w.is_floating_point() or type(w) not in (torch.Tensor, torch.nn.Parameter))
        for w in weights
    )


def _same(one: torch.Tensor, other: torch.Tensor, close: float | None = None) -> bool:
    if one.shape != other.shape:
        return False
    one, scale = one.to(other.device), other.double().abs().amax().clamp_min(1e-30)
    allowed = close or tolerance(other.dtype)
    return bool((one.double() - other.double()).abs().amax() <= allowed * scale)
