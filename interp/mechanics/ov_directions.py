"""The strongest directions of every head's OV circuit, as tokens read and tokens promoted.

W_V W_O = Σ_i σ_i u_i w_iᵀ (singular values): a head that attends to a token x adds Σ_i σ_i (x·u_i)
w_i to the stream. Tokens whose embeddings lie along u_i are read most by direction i, and the
logits that W_U gives w_i are raised (Millidge & Black 2022, "The singular value decompositions of
transformer weight matrices are highly interpretable"). Norm gains are folded in; what MLPs and
other layers make of tokens on the way is left out, so early layers are read better than late ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from interp.mechanics.weights import CHUNK, folded, main_sites
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp_hooks import HookedModel


class Direction(NamedTuple):
    """One direction: its share of ‖W_OV‖², and ids of tokens, the strongest first.

    Example:
        >>> first = interp.mechanics.ov_directions(model, k=1, tokens=3)["L0H0"][0]
        >>> len(first.reads), len(first.promotes)
        (3, 3)
    """

    share: float
    reads: list[int]
    promotes: list[int]
    lowers: list[int]


@torch.no_grad()
def ov_directions(model: Any, k: int = 2, tokens: int = 6) -> dict[str, list[Direction]]:
    """The k strongest directions of every head's OV circuit.

    The sign of a direction is free; it is set so that the tokens promoted stand out more than those
    lowered.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        k: how many directions.
        tokens: how many tokens of each kind.

    Returns:
        head → its directions, the strongest first.

    Raises:
        TapError: weights, norms or vocabulary are not known.

    Example:
        >>> directions = interp.mechanics.ov_directions(model, k=1)
        >>> len(directions), 0 < directions["L2H3"][0].share <= 1
        (32, True)
    """
    from interp.loading import load

    hooked: HookedModel = load(model)
    norms, vocabulary = hooked.norms(), hooked.vocabulary()
    last = norms.final()
    lengths = vocabulary.W_E.float().norm(dim=1).clamp_min(1e-12)
    heads, shares, reads, writes = list[Head](), list[list[float]](), list[Any](), list[Any]()
    for site in main_sites(hooked):
        layer = folded(hooked, site, norms)
        # V O = Q_v (R_v R_oᵀ) Q_oᵀ: its singular values are those of the small middle factor
        q_v, r_v = torch.linalg.qr(layer.V.float())  # (heads, d_model, d), (heads, d, d)
        q_o, r_o = torch.linalg.qr(layer.O.float().transpose(1, 2))
        u, s, w = torch.linalg.svd(r_v @ r_o.transpose(1, 2))
        n = min(k, s.shape[1])
        write = w[:, :n] @ q_o.transpose(1, 2)  # (heads, n, d_model)
        if last is not None:
            write = last.centred(write) * last.gain
        heads += [Head(site.layer, h, site.tower) for h in range(site.n_heads)]
        size = s.square()
        shares += (size[:, :n] / size.sum(1, keepdim=True).clamp_min(1e-300)).tolist()
        reads.append((q_v @ u[:, :, :n]).transpose(1, 2).flatten(0, 1))
        writes.append(write.flatten(0, 1))
    # all heads at once, so that the vocabulary, the largest matrix there is, is read twice
    up, down = extremes(torch.cat(writes), vocabulary.W_U, tokens)
    flip = up[1][:, 0] < -down[1][:, 0]  # (directions,)
    sign = torch.where(flip, -1.0, 1.0)[:, None]
    along, _ = extremes(torch.cat(reads) * sign, vocabulary.W_E.T, tokens, lengths)
    found, row = {}, 0
    for head, share in zip(heads, shares, strict=True):
        found[str(head)] = [
            Direction(
                share[i],
                along[0][row + i].tolist(),
                (down if flip[row + i] else up)[0][row + i].tolist(),
                (up if flip[row + i] else down)[0][row + i].tolist(),
            )
            for i in range(len(share))
        ]
        row += len(share)
    return found


Tops = tuple[torch.Tensor, torch.Tensor]


def extremes(
    directions: torch.Tensor, W: torch.Tensor, n: int, lengths: torch.Tensor | None = None
) -> tuple[Tops, Tops]:
    """((ids, values) of the largest, (ids, values) of the smallest) products of directions (…,
    d_model) with the tokens' columns of W (d_model, vocabulary), by their `lengths` where given."""
    x = directions.float()
    top = low = None
    for start in range(0, W.shape[1], CHUNK):
        products = x @ W[:, start : start + CHUNK].float()
        if lengths is not None:
            products = products / lengths[start : start + CHUNK]
        top, low = _best(top, products, start, n), _best(low, -products, start, n)
    assert top is not None and low is not None
    return top, (low[0], -low[1])


def _best(so_far: Tops | None, products: torch.Tensor, start: int, n: int) -> Tops:
    """(ids, values) of the n largest, of those so far and of products that begin at `start`."""
    found = products.topk(min(n, products.shape[-1]), -1)
    ids, values = found.indices + start, found.values
    if so_far is not None:
        ids, values = torch.cat([so_far[0], ids], -1), torch.cat([so_far[1], values], -1)
    best = values.topk(min(n, values.shape[-1]), -1)
    return ids.gather(-1, best.indices), best.values
