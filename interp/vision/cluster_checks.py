"""Whether clusters of a vision tower's heads are more than chance: over other pictures, over other
starts, and against patterns whose cells were dealt out anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import InputError
from interp.inputs.text import check_seed
from interp.support.checked import whole_number
from interp.vision.tower_patterns import autoencode, kmeans, mean_patterns
from interp.vision.towers import picture_tower

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.model import HookedModel

#: (shares (heads, n), clusters, seed) → labels (heads,)
Clustering = Callable[[torch.Tensor, int, int], np.ndarray]


def by_codes(shares: torch.Tensor, clusters: int, seed: int) -> np.ndarray:
    """k-means on the autoencoder's codes, as `cluster_heads` has it."""
    codes, _ = autoencode(shares.sqrt(), seed, 300)
    return kmeans(codes.double().numpy(), clusters, seed)


def by_patterns(shares: torch.Tensor, clusters: int, seed: int) -> np.ndarray:
    """k-means on the square roots of the shares themselves."""
    return kmeans(shares.sqrt().double().numpy(), clusters, seed)


KINDS: dict[str, Clustering] = {"codes": by_codes, "patterns": by_patterns}


def cluster_stability(
    model: HookedModel,
    prompts: Sequence[Mapping[str, Any]],
    clusters: int = 4,
    seed: int = 0,
    draws: int = 20,
) -> pd.DataFrame:
    """How well clusters of the vision tower's heads agree, over halves of the pictures and starts.

    Agreement is the adjusted Rand index: 1 for the same clusters, 0 on average for random ones of
    the same sizes (Hubert and Arabie 1985). The patterns are those of `cluster_heads`, for the
    clusters by its codes and for plain k-means on the patterns.

    Args:
        model: as in `cluster_heads`.
        prompts: inputs with images, two at least; every second one goes into the other half.
        clusters: how many.
        seed: of the clusterings and of the dealing.
        draws: of patterns dealt out anew.

    Returns:
        A row a kind, "codes" and "patterns": `halves`, the agreement of the two halves; `shuffled`
        and `shuffled_high`, its mean and 97.5 % quantile where each row of each head's pattern is
        dealt out anew among the cells, in each half by itself, which leaves how sharp a head is and
        not where it looks; `seeds`, the agreement of two seeds on all pictures; `layers`, that of
        the clusters with the layers.

    Raises:
        InputError: fewer than two prompts, clusters or draws below 1, and what `cluster_heads`
            raises.

    Misleads:
        Agreement over halves says that the patterns are measured well, not that there are kinds:
        one broad cloud is cut in the same places too. A model of random weights is the control.

    Example:
        >>> model = interp.load("llava")
        >>> from interp.vision.pictures import Pictures
        >>> some = Pictures(4, 0).inputs(model)
        >>> found = interp.vision.cluster_stability(model, some, clusters=2, draws=2)
        >>> list(found["kind"]), bool((found["halves"] <= 1).all())
        (['codes', 'patterns'], True)
    """
    import pandas as pd

    check_seed(seed)
    draws, clusters = whole_number(draws, "draws"), whole_number(clusters, "clusters")
    given = list(prompts)
    heads = [h for h in model.heads if h.tower == picture_tower(model)]
    if len(given) < 2 or draws < 1 or not 1 <= clusters <= len(heads):
        raise InputError(
            "Stability needs two prompts with pictures at least, a draw, and clusters up to the "
            f"number of heads, {len(heads)}; there are {len(given)} prompts, {draws} draws and "
            f"{clusters} clusters."
        )

    def shares(some: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        patterns = mean_patterns(model, some)
        return torch.stack([patterns[h.layer][h.head] for h in heads])  # (heads, cells, cells)

    one, other = shares(given[::2]), shares(given[1::2])
    layers = np.array([h.layer for h in heads])
    rows = [
        dict(kind=kind, **agreements(one, other, make, clusters, seed, draws, layers))
        for kind, make in KINDS.items()
    ]
    return pd.DataFrame(rows)


def agreements(
    one: torch.Tensor,
    other: torch.Tensor,
    make: Clustering,
    clusters: int,
    seed: int,
    draws: int,
    layers: np.ndarray,
) -> dict[str, float]:
    """The numbers of a row of `cluster_stability`, of patterns (heads, cells, cells) of two
    halves."""
    rng = torch.Generator().manual_seed(seed)

    def between(a: torch.Tensor, b: torch.Tensor, other_seed: int = seed) -> float:
        return rand_index(
            make(a.flatten(1), clusters, seed), make(b.flatten(1), clusters, other_seed)
        )

    def dealt(patterns: torch.Tensor) -> torch.Tensor:
        order = torch.rand(patterns.shape, generator=rng).argsort(-1)
        return patterns.gather(-1, order)

    chance = [between(dealt(one), dealt(other)) for _ in range(draws)]
    both = (one + other) / 2
    return dict(
        halves=between(one, other),
        shuffled=float(np.mean(chance)),
        shuffled_high=float(np.quantile(chance, 0.975)),
        seeds=between(both, both, seed + 1),
        layers=rand_index(make(both.flatten(1), clusters, seed), layers),
    )


def rand_index(one: np.ndarray, other: np.ndarray) -> float:
    """Adjusted Rand index of two labellings (n,): pairs together in both, against chance.

    Example:
        >>> from interp.vision.cluster_checks import rand_index
        >>> rand_index(np.array([0, 0, 1, 1]), np.array([5, 5, 3, 3]))
        1.0
    """

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1)).sum() / 2)

    _, a = np.unique(one, return_inverse=True)
    _, b = np.unique(other, return_inverse=True)
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    rows, columns, all_pairs = pairs(table.sum(1)), pairs(table.sum(0)), pairs(np.array(len(a)))
    chance = rows * columns / all_pairs if all_pairs else 0.0
    most = (rows + columns) / 2
    return 1.0 if most == chance else (pairs(table) - chance) / (most - chance)
