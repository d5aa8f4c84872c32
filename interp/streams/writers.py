"""Who wrote the residual stream: the embedding, every head's z_h W_O, the attention's biases, every
MLP, each as what it added to the stream at chosen positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interp.errors import TapError

if TYPE_CHECKING:
    from interp_hooks import HookedModel
    from interp_hooks.call import Site
    from interp_hooks.norms import Frozen, Norms

#: largest difference, relative to the size of the stream, by which parts may miss their sum
CLOSE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def main_sites(model: HookedModel) -> list[Site]:
    """The self-attentions of the main tower."""
    return [s for s in model.sites if s.kind == "self" and s.tower == model.main_tower]


@dataclass(frozen=True)
class Written:
    """The stream at n positions as the sum of what was written, float64.

    `start` (n, d_model): what enters the first layer; `heads` layer → (n, heads, d_model); `biases`
    layer → (n, d_model), b_O and the branch norm's; `mlps` layer → (n, d_model), all that a block
    adds besides its attention.
    """

    start: torch.Tensor
    heads: dict[int, torch.Tensor]
    biases: dict[int, torch.Tensor]
    mlps: dict[int, torch.Tensor]


@torch.no_grad()
def written(
    model: HookedModel,
    norms: Norms,
    sites: Sequence[Site],
    stream: Mapping[tuple[str, int], torch.Tensor],
    z: Mapping[int, torch.Tensor],
    into: int | None = None,
) -> Written:
    """What the layers `sites` wrote, from the stream (place, layer) → (n, d_model) float64 and z
    layer → (n, heads, d_head) at n positions.

    `into` is a layer that reads the sum: what enters it must be what the last of them left.

    Raises `TapError` where a layer's stream is not the sum of these, or something stands between
    layers.
    """
    results: dict[int, torch.Tensor] = {}
    biases: dict[int, torch.Tensor] = {}
    mlps: dict[int, torch.Tensor] = {}
    previous: torch.Tensor | None = None
    for site in sites:
        pre, post = stream["pre", site.layer], stream["post", site.layer]
        _check_follows(model, previous, pre, site.layer)
        previous = post
        result, bias = _attention(model, norms, site, z[site.layer])
        added = result.sum(1) + bias
        middle = stream.get(("mid", site.layer))
        if middle is not None and not close(pre + added, middle, model):
            raise TapError(
                f"Layer {site.layer} of {model.name} does more than add Σ_h z_h W_O + b_O to the "
                "stream (it scales, "
                "gates or normalises it), so direct contributions can't be told."
            )
        results[site.layer], biases[site.layer] = result, bias
        mlps[site.layer] = post - pre - added
    if into is not None:
        _check_follows(model, previous, stream["pre", into], into)
    start = stream["pre", sites[0].layer if sites else into]  # type: ignore[index]
    return Written(start, results, biases, mlps)


def _check_follows(
    model: HookedModel, previous: torch.Tensor | None, pre: torch.Tensor, layer: int
) -> None:
    if previous is not None and not close(previous, pre, model):
        raise TapError(
            f"Something stands between layer {layer} of {model.name} and the one before it."
        )


def close(a: torch.Tensor, b: torch.Tensor, model: HookedModel) -> bool:
    """Whether a is b, up to rounding in the model's precision."""
    dtype = next(model.module.parameters()).dtype
    most = CLOSE.get(dtype, 2e-2) * float(b.abs().max().clamp_min(1e-30))
    return float((a - b).abs().max()) <= most


def back(frozen: Frozen, vectors: torch.Tensor) -> torch.Tensor:
    """(n, d_model) w with w · r = vectors · frozen(r): the transpose of the linear map."""
    return frozen.norm.centred(vectors * frozen.norm.gain.to(vectors)) * frozen.scale


def _attention(
    model: HookedModel, norms: Norms, site: Site, z: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, heads, d_model) and (n, d_model) float64: what heads and biases add to the stream; z (n,
    heads, d_head)."""
    result, bias = heads_and_bias(model, site, z)
    after = norms.branch(site.layer)
    if after is None:
        return result, bias
    frozen = after.frozen((result.sum(1) + bias).to(next(model.module.parameters()).dtype))
    # scale (n, 1) is the same for all heads
    by_head = after.centred(result) * after.gain * frozen.scale[:, None]
    return by_head, frozen(bias) + frozen.bias


def heads_and_bias(
    model: HookedModel, site: Site, z: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, heads, d_model) z_h W_O,h and (n, d_model) b_O, float64, before a norm on the branch."""
    weights = model.head_weights(site.layer, site.tower)
    result = torch.einsum("nhd,hdm->nhm", z.double(), weights.W_O.double())
    bias = result.new_zeros(len(z), result.shape[-1])
    return result, bias if weights.b_O is None else bias + weights.b_O.double()


@torch.no_grad()
def frozen_end(
    model: HookedModel, norms: Norms, end: torch.Tensor, final: torch.Tensor | None
) -> Frozen | None:
    """The final norm, its scale held at `end` (n, d_model), the stream that the last block leaves,
    in the model's own precision; None where there is no norm, and at most a projection.

    Raises `TapError` where it does not make `final` of it.
    """
    last = norms.final()
    if last is None:
        return None
    frozen = last.frozen(end)
    if final is None or not close(frozen(end.double()) + frozen.bias, final.double(), model):
        raise TapError(
            f"The final norm of {model.name} does not read the stream of its last attention block."
        )
    return frozen
