"""Composition of heads: how much a later head's queries, keys or values read from what an earlier
head writes.

Elhage et al. 2021, section "Two-Layer Attention-Only Transformers". With rows as vectors, W_OV =
W_V W_O and W_QK = W_Q W_Kᵀ (d_model × d_model), h₁ in an earlier layer than h₂:

    Q: ‖W_OV¹ W_QK²‖ / (‖W_OV¹‖ ‖W_QK²‖)
    K: ‖W_OV¹ W_QK²ᵀ‖ / (…)
    V: ‖W_OV¹ W_OV²‖ / (‖W_OV¹‖ ‖W_OV²‖)

in Frobenius norms. Norm gains are folded in; scales of norms, rotary positions and query/key norms
are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import InputError
from interp.mechanics.weights import Folded, folded, main_sites
from interp_hooks.heads import Head

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks import HookedModel

#: pairs of random matrices that the expected score is a mean over
DRAWS = 32


@torch.no_grad()
def composition(model: Any, kinds: str = "qkv") -> pd.DataFrame:
    """Q-, K- and V-composition scores of every pair of heads, against random matrices.

    Nothing of the size d_model × d_model is made: a product of rank d_head has the norm of a d_head
    × d_head one once its outer factors are replaced by the triangular ones of their QR
    decompositions.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        kinds: of q, k and v.

    Returns:
        A row a pair of heads and kind: `sender`, `receiver` ("L0H1"), `kind` (q, k or v), `score`
        in [0, 1], and `above_random`, the score minus its mean over random matrices of the same
        shapes (products of Gaussian factors).

    Raises:
        InputError: `kinds` names something else, or the model has a single layer.
        TapError: weights or norms not known.

    Example:
        >>> frame = interp.mechanics.composition(model, "k")
        >>> len(frame), list(frame)
        (384, ['sender', 'receiver', 'kind', 'score', 'above_random'])
    """
    from interp.loading import load

    if not kinds or not isinstance(kinds, str) or set(kinds) - set("qkv"):
        raise InputError(
            f"The kinds of composition are q, k and v, as in kinds='qk'; {kinds!r} is not that."
        )
    kinds = "".join(dict.fromkeys(kinds))
    hooked = load(model)
    if len(main_sites(hooked)) < 2:
        raise InputError(
            f"{hooked.name} has a single attention layer, so no head reads from another."
        )
    return scores_of(hooked, kinds, torch.float64)


def scores_of(hooked: HookedModel, kinds: str, dtype: torch.dtype) -> pd.DataFrame:
    """`composition`, its products in this precision."""
    import pandas as pd

    layers = _factors(hooked, kinds, dtype)
    names = {
        n: np.array([str(Head(n, h, _tower(hooked))) for h in range(len(s))])
        for n, (s, _) in layers.items()
    }
    blocks = [(one, two, kind) for one in layers for two in layers if two > one for kind in kinds]
    sizes = [len(names[one]) * len(names[two]) for one, two, _ in blocks]
    # what stays is made at once: small arrays between the products' large ones, which come and go,
    # keep the allocator from using their places again, a gigabyte of them
    score, expected = np.empty(sum(sizes)), np.empty(sum(sizes))
    random: dict[tuple[int, int, int], float] = {}
    ends = np.cumsum(sizes)
    for (one, two, kind), size, end in zip(blocks, sizes, ends, strict=True):
        senders, readers = layers[one][0], layers[two][1][kind]
        shapes = senders.shape[1], senders.shape[2], readers.shape[2]
        if shapes not in random:
            random[shapes] = _expected(*shapes)
        here = slice(end - size, end)
        score[here] = _scores(senders, readers).flatten().cpu().numpy()  # senders × receivers
        expected[here] = random[shapes]
    columns = dict(
        sender=[np.repeat(names[one], len(names[two])) for one, two, _ in blocks],
        receiver=[np.tile(names[two], len(names[one])) for one, two, _ in blocks],
        kind=[np.full(size, kind) for (_, _, kind), size in zip(blocks, sizes, strict=True)],
    )
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    return pd.DataFrame({**joined, "score": score, "above_random": score - expected})


def _tower(model: HookedModel) -> str:
    return main_sites(model)[0].tower


def _factors(
    model: HookedModel, kinds: str, dtype: torch.dtype
) -> dict[int, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """layer → (S (heads, d_head, d_model), kind → R (heads, d_model, d_head)): ‖W_OV¹ X²‖ = ‖S¹
    R²‖; made in float64, one layer at a time, and kept in `dtype`."""
    norms = model.norms()
    factors = {}
    for site in main_sites(model):
        layer: Folded = folded(model, site, norms)
        q, k, v, o = (_triangle(w) for w in (layer.Q, layer.K, layer.V, layer.O.transpose(1, 2)))
        pairs = dict(q=(layer.Q, k), k=(layer.K, q), v=(layer.V, o))
        readers = {  # (heads, d_model, d_head)
            kind: (pairs[kind][0] @ pairs[kind][1].transpose(1, 2)).to(dtype) for kind in kinds
        }
        factors[site.layer] = (v @ layer.O).to(dtype), readers
    return factors


def _triangle(weight: torch.Tensor) -> torch.Tensor:
    """(heads, d_head, d_head) R of weight (heads, d_model, d_head) = U R with orthonormal U."""
    return torch.linalg.qr(weight, mode="r").R


def _scores(senders: torch.Tensor, readers: torch.Tensor) -> torch.Tensor:
    """(senders, receivers) of senders (…, d_head, d_model) and readers (…, d_model, d_head'); 0 for
    a head of zeros."""
    rank, other = senders.shape[1], readers.shape[2]
    # all pairs of two layers in one product, (senders · d_head, receivers · d_head')
    rows = senders.flatten(0, 1)
    columns = readers.transpose(0, 1).flatten(1)
    square = (rows @ columns).square_().view(len(senders), rank, len(readers), other).sum((1, 3))
    sizes = [x.square().sum((1, 2)).sqrt() for x in (senders, readers)]
    size = sizes[0][:, None] * sizes[1]
    return torch.where(size > 0, square.sqrt() / size.clamp_min(1e-300), 0.0)


def _expected(rank: int, d_model: int, other: int) -> float:
    """Mean score of random W₁ = A₁B₁ and W₂ = A₂B₂, all entries of the factors independent
    Gaussians."""
    draw = torch.Generator().manual_seed(0)

    def gauss(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    total = 0.0
    for _ in range(DRAWS):
        sender = _triangle(gauss(1, d_model, rank))[0] @ gauss(rank, d_model)
        reader = gauss(d_model, other) @ _triangle(gauss(1, d_model, other))[0].T
        total += float(_scores(sender[None], reader[None]))
    return total / DRAWS
