"""Per-head weights of a HuggingFace attention module, by its layout. GQA mapped to query heads."""

from __future__ import annotations

from typing import Any

import torch

from interp_hooks.call import Site
from interp_hooks.errors import TapError
from interp_hooks.head_weights import HeadWeights
from interp_hooks.huggingface.layout import Layout
from interp_hooks.huggingface.projections import outputs


def _matrix(linear: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, in) weight and bias of a Linear or a GPT-2 Conv1D (which stores it transposed)."""
    weight: Any = linear.weight
    if type(linear).__name__ == "Conv1D":
        weight = weight.T
    return weight.detach(), None if linear.bias is None else linear.bias.detach()


def head_output(
    module: torch.nn.Module, site: Site, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W_O (heads, d_v, d_model) and b_O. Raises `TapError` if there is no output projection of the
    right shape."""
    projection = layout.find(module, "output_projection")
    if projection is None or not hasattr(projection, "weight"):
        raise TapError(
            f"{type(module).__name__} (layer {site.layer}) has no output projection this toolkit "
            "knows; name it with layout=Layout(output_projection=…)."
        )
    weight, bias = _matrix(projection)
    if weight.shape[1] % site.n_heads:
        raise TapError(
            f"The output projection of layer {site.layer} does not split into {site.n_heads} heads."
        )
    return weight.T.reshape(site.n_heads, -1, weight.shape[0]), bias


def head_weights(module: torch.nn.Module, site: Site, layout: Layout) -> HeadWeights:
    """`HeadWeights` of an attention module. Raises `TapError` for projections not known here."""
    by_head: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for projection, parts in outputs(module, site, layout):
        weight, bias = _matrix(projection)
        for place, numbers in parts.items():  # (heads or kv_heads, d_head) rows of the weight
            repeat = site.n_heads // len(numbers)
            rows = numbers.to(weight.device).repeat_interleave(repeat, 0)
            heads = weight[rows].transpose(1, 2).contiguous()  # (heads, d_model, d_head)
            by_head[place] = heads, None if bias is None else bias[rows]
    (wq, bq), (wk, bk), (wv, bv) = (by_head[place] for place in "qkv")
    wo, bo = head_output(module, site, layout)
    return HeadWeights(wq, wk, wv, wo, bq, bk, bv, bo)
