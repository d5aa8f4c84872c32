"""Edits as an engine can serve them: what they need of a reference is measured beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from interp import edits as every
from interp.edits.ablate import BoundAblate
from interp.edits.head_edit import HeadEdit
from interp_hooks.edit import edits_of
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp_hooks.protocol import Model


def settled(model: Model, edits: Sequence[HeadEdit] | HeadEdit) -> list[HeadEdit]:
    """Edits that need nothing but the prompt at hand: a mean ablation becomes its mean.

        z_h ← mean_h        is        z_h ← 0 · z_h + mean_h

    in the same scope and query rows. An engine (`interp_vllm`) has not read the reference that a
    mean is of; with the mean in it the edit is served as any other.

    Args:
        model: the model of transformers that the mean is measured in.
        edits: in order.

    Returns:
        the edits, each `Ablate(mode="mean")` as a `ScaleHeads` and a `ShiftHeads`.

    Raises:
        EditError, HeadError: as the edit itself.

    Example:
        >>> mean = interp.edits.Ablate(["L2H3"], mode="mean", reference="ioi")
        >>> [edit.name for edit in interp.serving.settled(model, mean)]
        ['scale_heads', 'shift_heads']
    """
    found: list[HeadEdit] = []
    for edit in edits_of(edits):
        if not isinstance(edit, every.Ablate) or edit.mode != "mean":
            found.append(edit)
            continue
        bound = edit.bind(model)
        assert isinstance(bound, BoundAblate)
        means = {
            Head(site.layer, head): bound.pools[site.layer].float().mean(0)[head]
            for site in model.sites
            if edit.at(site)
            for head in edit.heads_at(site)
        }
        found += [
            every.ScaleHeads(dict.fromkeys(means, 0.0), None, edit.scope, edit.queries),
            every.ShiftHeads(
                {head: mean.tolist() for head, mean in means.items()},
                scope=edit.scope,
                queries=edit.queries,
            ),
        ]
    return found
