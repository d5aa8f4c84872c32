"""The tap on HuggingFace models: one registered attention function, installed only inside our
blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from interp_hooks.call import AttentionCall, Site
from interp_hooks.errors import TapError
from interp_hooks.huggingface.masks import describe, read

#: The registered name. It must not contain "flash", "sdpa", "flex_attention" or "/": transformers
#: looks for those.
NAME = "interp_tap"

# Which attention modules are tapped now, and by whom. Filled on entry of a block, emptied on exit.
_LIVE: dict[int, tuple[Site | None, Callable[..., torch.Tensor]]] = {}


def _tap(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: builds the call, lets the handler answer with z (batch, queries,
    heads, d)."""
    live = _LIVE.get(id(module))
    if live is None:
        raise TapError(
            f"An attention module of type {type(module).__name__} is not part of the tapped model "
            "(was it replaced or "
            "copied after loading?); load the model again."
        )
    if dropout:
        raise TapError(
            "The model is in training mode with attention dropout; call model.module.eval() first."
        )
    site, handler = live
    mask = read(attention_mask, module, query.shape[2], key.shape[2], kwargs)
    bias = kwargs.get("position_bias")
    if bias is not None:
        mask = replace(mask, dense=_with_bias(mask, bias, query, key))
    call = AttentionCall(
        site if site is not None else _provisional(module, query, key),
        query,
        key,
        value,
        mask,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        kwargs.get("softcap"),
        kwargs.get("s_aux"),
    )
    z = handler(call) if site is not None else handler(module, call)
    return z.contiguous(), None  # some architectures view it instead of reshaping it (AFMoE)


def _with_bias(mask, bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A 4-D float bias that also holds the mask's own 4-D part."""
    bias = bias[..., -query.shape[2] :, : key.shape[2]].float()
    if mask.dense is None:
        return bias
    own = mask.dense
    return torch.where(own, bias, -torch.inf) if own.dtype == torch.bool else bias + own


def _provisional(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> Site:
    layer = getattr(module, "layer_idx", None)
    return Site(
        "",
        -1 if layer is None else layer,
        "self",
        "",
        query.shape[1],
        key.shape[1],
        query.shape[-1],
    )


def configs_of(model: Any) -> dict[int, Any]:
    """Every config object that chooses an attention implementation, by id."""
    by_id, queue = {}, [model.config]
    queue += [
        m.config
        for m in model.modules()
        if hasattr(m, "config") and hasattr(m.config, "sub_configs")
    ]
    while queue:
        config = queue.pop()
        if id(config) in by_id or not hasattr(config, "_attn_implementation"):
            continue
        by_id[id(config)] = config
        queue += [
            s
            for k in getattr(config, "sub_configs", {})
            if (s := getattr(config, k, None)) is not None
        ]
    return by_id


@contextmanager
def installed(
    model: Any, live: Mapping[int, tuple[Site | None, Callable[..., torch.Tensor]]]
) -> Iterator[None]:
    """Route the model's attention through `_tap` until the block ends, then put everything back as
    it was."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _tap)
    AttentionMaskInterface.register(NAME, describe)
    configs = configs_of(model)
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    outer = {key: _LIVE[key] for key in live if key in _LIVE}
    try:
        for config in configs.values():
            config._attn_implementation_internal = NAME
        _LIVE.update(live)
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for key in live:
            _LIVE.pop(key, None)
        _LIVE.update(outer)
