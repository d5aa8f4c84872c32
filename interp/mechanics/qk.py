"""Why a head looks where it looks: the score of one query and one key, by who wrote both
streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from interp.streams.qk import QKAttribution, Writer, main_site, one_text, place_in, split
from interp_hooks.heads import Head

__all__ = ["QKAttribution", "Writer", "qk_attribution"]


def qk_attribution(
    model: Any, input_ids: torch.Tensor, head: str | Head | Sequence[int], query: int, key: int
) -> QKAttribution:
    """Splits the score of a head from one query to one key over the writers of both streams.

    s = scaling · q·k = Σ_{u,v} (x_u N_q W_Q L_q)·(x_v N_k W_K L_k) scaling: N the norm before
    attention and L the norm of queries or keys with their scales frozen, and the rotation. Of one
    forward, up to the head's layer, in O(tokens) memory, and d_head steps back through the rotation
    for query and key each.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        input_ids: (1, tokens).
        head: in any spelling, of the main tower.
        query, key: places in the text; negative ones count from the end.

    Returns:
        A `QKAttribution`.

    Raises:
        HeadError: no such head.
        InputError: several texts, a place outside the text, a key that the query does not see, or
            edits that are active.
        TapError: the stream is not the sum of what heads and MLPs write, its norm or the
            projections are not known (BERT's norms, MLA), or the model shows no rotated queries
            (TransformerLens).

    Misleads:
        Scores of one query count only against those of other keys: what is the same for all keys (a
        bias of the key, say) is in the table and moves no attention. Parts of opposite sign may be
        far larger than their sum. Frozen scales leave out that a writer also changes the norm: the
        table says what makes up the score, not what it would be without a writer.

    Example:
        >>> ids = torch.tensor([[5, 9, 7, 5, 9]])
        >>> found = interp.mechanics.qk_attribution(model, ids, "L2H4", query=-1, key=2)
        >>> found.pairs(3).columns.tolist()
        ['query', 'key', 'score']
    """
    from interp.loading import load

    hooked = load(model)
    target = hooked.check(Head.parse(head))
    main_site(hooked, target)
    ids = one_text(hooked, input_ids)
    return split(hooked, ids, target, place_in(ids, query, "query"), place_in(ids, key, "key"))
