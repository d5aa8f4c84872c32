"""Which token, through which head, pushes which logit."""

from __future__ import annotations

from typing import Any

import torch

from interp.errors import InputError
from interp.streams.qk import one_text, place_in
from interp.streams.sources import Sources, toward
from interp_hooks.whole_numbers import quoted

__all__ = ["Sources", "sources"]


def sources(
    model: Any,
    input_ids: torch.Tensor,
    direction: torch.Tensor,
    heads: Any = None,
    position: int = -1,
) -> Sources:
    """Direct contributions, by key, of heads to a direction at one position of one text.

    A_k (v_k W_O,h)·u with the final norm frozen; of one forward, of which one row of attention and
    the values are kept: no tokens × tokens. For a logit the direction is a column of
    `model.vocabulary().W_U` (times its `logit_scale`), for a difference that of two.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        input_ids: (1, tokens).
        direction: (d_model,), what the final norm's output is multiplied with.
        heads: one head, several, or None for all of the main tower.
        position: a place in the text; negative ones count from the end.

    Returns:
        A `Sources`. Over keys its values sum to what `mechanics.direct` gives for the head.

    Raises:
        HeadError: no such head.
        InputError: several texts, a place outside the text, a direction of another width, or edits
            that are active.
        TapError: weights or norms are not known, or something stands between the attention and W_O
            (an output gate), so that z is not the sum over keys.

    Misleads:
        It is the direct path alone: what a head does through later heads and MLPs is not in it. A
        value also holds what earlier heads wrote at the key, not the key's token alone. A weight on
        a sink with a short value gives next to nothing.

    Example:
        >>> ids = torch.tensor([[5, 9, 7, 5, 9]])
        >>> found = interp.mechanics.sources(model, ids, model.vocabulary().W_U[:, 7], "L2H4")
        >>> found.top(2).columns.tolist()
        ['head', 'key', 'weight', 'value']
    """
    from interp.loading import load

    hooked = load(model)
    ids = one_text(hooked, input_ids)
    width = hooked.norms().d_model
    if not isinstance(direction, torch.Tensor) or direction.shape != (width,):
        raise InputError(f"direction is a tensor ({width},), d_model, not {quoted(direction)}.")
    return toward(hooked, ids, place_in(ids, position, "position"), heads, lambda final: direction)
