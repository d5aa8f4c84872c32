"""Semantics-adaptive intervention from two lists of texts: heads that differ, amplified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from interp.edits.fit_iti import last_outputs
from interp.edits.scale_heads import ScaleHeads
from interp.errors import InputError
from interp.support.checked import whole_number

#: share of all heads unless told otherwise; the paper searches it on held-out problems
SHARE = 0.02


def sadi_for(
    model: Any,
    towards: Sequence[str],
    away: Sequence[str],
    k: int | None = None,
    strength: float = 1.0,
) -> ScaleHeads:
    """The edit that amplifies the heads whose output differs most between two kinds of texts.

    SADI-HEAD (Wang et al., ICLR 2025, arXiv 2410.12299): with D_h the mean difference of z_h at the
    last token of a positive and a negative text,

        M = the k heads of the largest ‖D_h‖        z_h ← z_h + δ·z_h for h in M

    so the vector that is added is the input's own, and a gain of 1 + δ on chosen heads is all of
    it: `ScaleHeads`.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        towards: positive texts; in the paper, a question with its right answer.
        away: negative ones, pair by pair.
        k: heads; None for 2 % of all.
        strength: δ; the paper searches k and δ on held-out problems.

    Returns:
        `ScaleHeads` with 1 + δ on the chosen heads.

    Raises:
        InputError: lists of different lengths, no text, or more heads than there are.

    Misleads:
        Heads of large outputs have large differences: beside it belong the k heads of the largest
        mean output, and random ones.

    Example:
        >>> right = ["two and two is four", "one and one is two"]
        >>> wrong = ["two and two is five", "one and one is six"]
        >>> edit = interp.edits.sadi_for(model, right, wrong, k=2, strength=0.5)
        >>> set(edit.values), len(edit.heads)
        ({1.5}, 2)
    """
    from interp.loading import load

    if isinstance(towards, str) or isinstance(away, str) or not len(towards):
        raise InputError("SADI takes two lists of texts, pair by pair.")
    if len(towards) != len(away):
        raise InputError(
            f"SADI takes pairs of texts, and the lists have {len(towards)} and {len(away)}."
        )
    hooked = load(model)
    heads, z = last_outputs(hooked, [*towards, *away])
    n = len(towards)
    size = torch.cat([(x[:n].double() - x[n:].double()).mean(0).norm(dim=-1) for x in z])
    count = max(1, round(SHARE * len(heads))) if k is None else whole_number(k, "k of SADI")
    if not 1 <= count <= len(heads):
        raise InputError(f"SADI scales 1 to {len(heads)} heads of {hooked.name}, not {count}.")
    best = size.argsort(descending=True, stable=True)[:count].tolist()
    return ScaleHeads({str(heads[i]): 1.0 + strength for i in best})
