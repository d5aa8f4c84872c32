"""Head weights against what an attention did with what it read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp_hooks.call import AttentionCall, Site
from interp_hooks.head_weights import HeadWeights
from interp_hooks.model import HookedModel
from interp_hooks.question import Question


def value_error(
    model: HookedModel, inputs: dict[str, Any], site: Site, weights: HeadWeights
) -> float | None:
    """How far x W_V + b_V is from the values of a site's call, relative to their largest; None
    where what the attention reads is not known."""
    entered: list[Tensor] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor):
            entered.append(x)

    calls: list[AttentionCall] = []

    def keep(stats: Any) -> None:
        if stats.site == site:
            calls.append(stats.call)

    attention = model.module.get_submodule(site.path)
    hooked = attention.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with model.watch(Question(call=True), keep):
            model(**inputs)
    finally:
        hooked.remove()
    if len(entered) != 1 or len(calls) != 1 or entered[0].ndim != 3:
        return None
    value = calls[0].value
    value = value.repeat_interleave(site.n_heads // value.shape[1], 1)
    try:
        ours = torch.einsum("bqm,hmd->bhqd", entered[0], weights.W_V.to(entered[0]))
    except RuntimeError:
        return None
    if weights.b_V is not None:
        ours = ours + weights.b_V[None, :, None].to(ours)
    if ours.shape != value.shape:
        return None
    return float((ours - value).abs().max() / value.abs().max().clamp_min(1e-6))
