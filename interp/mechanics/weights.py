"""Head weights that read and write the residual stream itself: the norms' gains and centring folded
in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interp.streams.writers import main_sites

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks import HookedModel
    from interp_hooks.call import Site
    from interp_hooks.norms import Norms
    from interp_hooks.vocabulary import Vocabulary

#: rows of the vocabulary multiplied at a time
CHUNK = 8192


@dataclass(frozen=True)
class Folded:
    """One layer's weights by query head, float64, without biases: Q, K, V (heads, d_model, d_head),
    O (heads, d_head, d_model). A head moves x_k V O from key k to the query with a weight that
    grows with x_q Q Kᵀ x_kᵀ.

    The norm before attention is folded into Q, K and V and a norm on the attention's branch into O,
    each up to its scale 1/σ(x), which depends on the token. Rotary positions and query/key norms
    are left out.
    """

    Q: torch.Tensor
    K: torch.Tensor
    V: torch.Tensor
    O: torch.Tensor  # noqa: E741 - the field's name


@torch.no_grad()
def folded(model: HookedModel, site: Site, norms: Norms) -> Folded:
    """`Folded` of a layer. Raises `TapError` where its weights or norms are not known."""
    weights = model.head_weights(site.layer, site.tower)
    before, after = norms.attention(site.layer), norms.branch(site.layer)
    q, k, v = (
        w.detach().double() if before is None else before.fold_in(w.detach())
        for w in (weights.W_Q, weights.W_K, weights.W_V)
    )
    out = weights.W_O.detach().double()
    return Folded(q, k, v, out if after is None else after.fold_out(out))


@torch.no_grad()
def through_vocabulary(vocabulary: Vocabulary, norms: Norms) -> tuple[torch.Tensor, torch.Tensor]:
    """(W_U W_E, W_Eᵀ W_E), both (d_model, d_model) float64, W_E and W_U with their scales, the
    final norm in W_U."""
    d_model = vocabulary.W_E.shape[1]
    out, same = (vocabulary.W_E.new_zeros(d_model, d_model, dtype=torch.float64) for _ in range(2))
    for start in range(0, min(vocabulary.W_E.shape[0], vocabulary.W_U.shape[1]), CHUNK):
        embed = vocabulary.W_E[start : start + CHUNK].double()
        unembed = vocabulary.W_U[:, start : start + CHUNK].double()
        out += unembed @ embed[: unembed.shape[1]]
        same += embed.T @ embed
    out *= vocabulary.embed_scale * vocabulary.logit_scale
    last = norms.final()
    return out if last is None else last.fold_in(out), same * vocabulary.embed_scale**2


def head_rows(model: HookedModel) -> pd.DataFrame:
    """A row a head of the main tower with the columns an atlas begins with."""
    from interp.results.frame import rows_of

    return rows_of(main_sites(model))
