"""The weights of a model with edits folded into its output projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.fold import Affine
from interp.edits.vector_edit import check_width
from interp.errors import InputError

if TYPE_CHECKING:
    from interp_hooks.call import Site
    from interp_hooks.model import HookedModel


def folded_weights(
    model: HookedModel, folds: Mapping[Site, Affine]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(name → weight with the gains in it, name → bias with the offsets in it), of the output
    projections that change; a bias is given only where there is an offset.

    W_O,h ← γ_h W_O,h and b_O ← b_O + Σ_h W_O,h b_h, summed in float64, with the untouched W_O.

    Raises:
        InputError: a projection whose weights can't be rewritten (adapters, quantised), one that
            several layers share, or an offset where a gate comes between.
        TapError: no projection is known.
    """
    paths = {id(module): path for path, module in model.module.named_modules()}
    weights: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor] = {}
    for site, fold in folds.items():
        if bool((fold.gain == 1).all()) and fold.offset is None:
            continue
        projection = model.output_projection(site)
        path = paths[id(projection)]
        weight = _plain_weight(projection, site)
        if f"{path}.weight" in weights or _is_shared(model, projection, site):
            raise InputError(
                f"The output projection of {site.place} serves other layers too ({path}), so that "
                "heads of one layer can't be baked into it; edit them while the model runs "
                "(--edit)."
            )
        # Conv1D of GPT-2 stores W_O as it is applied, Linear transposed
        rows = weight if _is_transposed(projection) else weight.T  # (heads · d, d_model)
        by_head = rows.double().reshape(site.n_heads, -1, rows.shape[1])  # (heads, d, d_model)
        scaled = (by_head * fold.gain.to(by_head)[:, None, None]).reshape(rows.shape)
        scaled = scaled if _is_transposed(projection) else scaled.T
        weights[f"{path}.weight"] = scaled.to(weight).contiguous()
        if fold.offset is not None:
            if site.output_gate:
                raise InputError(
                    f"A gate comes between the heads of {site.place} and W_O, so that what stands "
                    "in for a head would change from token to token; bake gains or mode zero, or "
                    "edit while the model runs (--edit)."
                )
            check_width(site, fold.offset.shape[1], by_head.shape[1])
            bias = torch.einsum("hd,hdm->m", fold.offset.to(by_head), by_head)
            own = getattr(projection, "bias", None)
            total = bias + own.detach().double() if isinstance(own, torch.Tensor) else bias
            biases[f"{path}.bias"] = total.to(weight)
    return weights, biases


def _plain_weight(projection: Any, site: Site) -> torch.Tensor:
    weight = getattr(projection, "weight", None)
    kinds = {base.__name__ for base in type(projection).__mro__}
    if (
        kinds.isdisjoint({"Linear", "Conv1D"})
        or type(weight) not in (torch.nn.Parameter, torch.Tensor)
        or not isinstance(weight, torch.Tensor)
        or not weight.is_floating_point()
        or weight.ndim != 2
        or weight.is_meta
    ):
        raise InputError(
            f"The output projection of {site.place} is a {type(projection).__name__} whose "
            "weights can't be rewritten; merge adapters first (merge_and_unload), and load "
            "quantised or offloaded models in full."
        )
    return weight.detach()


def _is_transposed(projection: Any) -> bool:
    return any(base.__name__ == "Conv1D" for base in type(projection).__mro__)


def _is_shared(model: HookedModel, projection: Any, site: Site) -> bool:
    from interp.errors import TapError

    def is_it(other: Site) -> bool:
        try:
            return model.output_projection(other) is projection
        except TapError:
            return False

    return any(is_it(other) for other in model.sites if other != site)
