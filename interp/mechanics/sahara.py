"""Groups of heads without which a model's last states lie in another space: Sahara."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError
from interp.inputs.endings import main_heads
from interp.inputs.requests import asked
from interp.inputs.tokenizer import Text
from interp.mechanics.ablated_ends import AblatedEnds
from interp.support.checked import whole_number

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.heads import Head


def sahara(
    model: Any,
    texts: Sequence[str],
    k: int = 3,
    rank: int = 1,
    mode: str = "uniform",
    among: Sequence[Any] | None = None,
) -> pd.DataFrame:
    """A group of heads, found greedily, whose ablation turns the last states of requests furthest.

    With H (requests, d_model) the states that the unembedding reads at each request's last token,
    H_G those with a group G of heads ablated, and U, U_G the first `rank` left singular vectors of
    each, (requests, rank),

        Ships(G) = Σ_r arccos σ_r(Uᵀ U_G)        (in degrees)

    and step by step the head with the largest Ships(G ∪ {h}) joins G (Zhou et al. 2024, arXiv
    2410.13708, Sahara). The released code has rank 1; so is the default here.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        texts: requests, put into the chat template where there is one.
        k: heads of the group, one a step.
        rank: how many singular vectors span the space.
        mode: as in `interp.edits.Ablate`: "uniform", the paper's undifferentiated attention, or
            "zero", its scaled contribution.
        among: the heads to choose from; None for all of the main tower.

    Returns:
        A row a step: `step`, `head`, `angle` (degrees, with the heads so far), `next_head` and
        `next_angle` (the second best of that step).

    Raises:
        InputError: fewer texts than `rank` + 1, no rank, or a group larger than the choice.

    Misleads:
        It needs no harmful request: of any texts some head turns the states furthest. Run it on
        harmless twins too, and see whether the groups differ.

    Example:
        >>> texts = ["the cat saw the dog", "the man took a book", "the girl liked the boy"]
        >>> found = interp.mechanics.sahara(model, texts, k=2, among=["L1H0", "L1H1", "L3H2"])
        >>> list(found["step"]), len(set(found["head"]))
        ([1, 2], 2)
    """
    import pandas as pd

    from interp.loading import load
    from interp_hooks.heads import parse_heads

    hooked = load(model)
    k, rank = whole_number(k, "k of Sahara"), whole_number(rank, "rank of Sahara")
    if isinstance(texts, str) or not 0 < rank < len(texts):
        raise InputError(
            f"Sahara takes a list of texts and spans a space of rank 1 to one less than they are, "
            f"not {rank}."
        )
    choice = main_heads(hooked) if among is None else [hooked.check(h) for h in parse_heads(among)]
    if not 0 < k <= len(choice):
        raise InputError(f"A group of Sahara has 1 to {len(choice)} heads, not {k}.")
    text = Text(hooked.tokenizer)
    ends = AblatedEnds(hooked, [asked(text, one) for one in texts], mode)
    before = space(ends.states([]).numpy(), rank)
    group: list[Head] = []
    rows = []
    for step in range(1, k + 1):
        angles = {
            head: turned(before, space(ends.states([*group, head]).numpy(), rank))
            for head in choice
            if head not in group
        }
        best = sorted(angles, key=lambda h: -angles[h])
        group.append(best[0])
        after = best[1] if len(best) > 1 else None
        rows.append(
            dict(
                step=step,
                head=str(best[0]),
                angle=angles[best[0]],
                next_head=str(after) if after else "",
                next_angle=angles[after] if after else np.nan,
            )
        )
    return pd.DataFrame(rows)


def space(states: np.ndarray, rank: int) -> np.ndarray:
    """(requests, rank): the leading left singular vectors of the states (requests, d_model)."""
    left, _, _ = np.linalg.svd(states, full_matrices=False)
    return np.asarray(left[:, :rank])


def turned(one: np.ndarray, other: np.ndarray) -> float:
    """Sum of the principal angles between two spaces, in degrees.

    Example:
        >>> from interp.mechanics.sahara import turned
        >>> x = np.eye(3)
        >>> round(turned(x[:, :1], x[:, :1])), round(turned(x[:, :2], x[:, 1:]))
        (0, 90)
    """
    from scipy.linalg import subspace_angles

    return float(np.degrees(subspace_angles(one, other)).sum())
