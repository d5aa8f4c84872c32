"""Cognitive-head steering from two lists of texts: heads by their probes, turned away from one
list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from interp.edits.fit_iti import ProbedHeads, probe_heads
from interp.edits.rotate_heads import RotateHeads
from interp.errors import InputError
from interp.support.checked import whole_number

#: share of all heads that are turned: 38 % in the released code
SHARE = 0.38


def crest_for(
    model: Any,
    towards: Sequence[str],
    away: Sequence[str],
    k: int | None = None,
    strength: float = 1.0,
    seed: int = 0,
) -> RotateHeads:
    """The edit that turns heads away from texts of one kind.

    CREST (Zhang et al. 2025, arXiv 2512.24574): a probe of each head's z at the last token of a
    step of reasoning tells non-linear steps (verification, backtracking) from linear ones; the
    heads whose probes do best lose the component along the direction between the two means, their
    length kept, while the model writes. Here the probes are those of `iti_for`, judged on texts
    that they were not fitted on.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        towards: texts of the kind that is wanted; in the paper, steps that go on.
        away: of the kind to be suppressed; in the paper, steps that check and turn back.
        k: heads; None for the released code's share, 38 %.
        strength: the share of the direction that is taken out.
        seed: of the folds.

    Returns:
        `RotateHeads` of scope "decode".

    Raises:
        InputError: fewer than five texts of a kind, or more heads than there are.

    Misleads:
        Fewer tokens are no better reasoning: judge the answers, beside as many random heads turned
        as far.

    Example:
        >>> on = [f"the {x} was good" for x in ("cat", "dog", "cup", "pen", "box")]
        >>> back = [f"the {x} was bad" for x in ("cat", "dog", "cup", "pen", "box")]
        >>> edit = interp.edits.crest_for(model, on, back, k=2)
        >>> len(edit.heads), edit.scope
        (2, 'decode')
    """
    from interp.loading import load

    hooked = load(model)
    probed = probe_heads(hooked, away, towards, seed)
    count = max(1, round(SHARE * len(probed.heads))) if k is None else whole_number(k, "k of CREST")
    if not 1 <= count <= len(probed.heads):
        raise InputError(
            f"CREST turns 1 to {len(probed.heads)} heads of {hooked.name}, not {count}."
        )
    return turned(probed, probed.strongest(count), strength)


def turned(probed: ProbedHeads, chosen: Sequence[int], strength: float) -> RotateHeads:
    """The edit that turns these heads, by place, away from their directions."""
    directions = {str(probed.heads[i]): probed.direction[i].float() for i in chosen}
    return RotateHeads(directions, strength, scope="decode")
