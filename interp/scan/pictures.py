"""Where the strongest heads look: which pictures a scan draws under which heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from interp.errors import InputError
from interp.probes import catalogue as probes
from interp.scores.score import Score
from interp.vision.words import word_overlays

if TYPE_CHECKING:
    from interp.atlas import Atlas
    from interp.probes.settings import Settings
    from interp.results.overlay import PictureOverlay
    from interp_hooks.heads import Head
    from interp_hooks.model import HookedModel

#: how many heads are drawn
HEADS = 7


def drawn(
    atlas: Atlas, model: HookedModel, settings: Settings, scores: Sequence[Score]
) -> tuple[list[PictureOverlay], list[str]]:
    """The pictures of a finished scan, and what a reader must know of them."""
    heads = strongest(atlas, model, scores)
    if settings.words is not None and heads:
        return word_overlays(model, settings.pictures, settings.words, heads)
    if settings.words is not None:
        return [], ["words: nothing is drawn, for no score that ranks heads was measured."]
    try:
        return (probes.get("image").overlays(model, settings, heads) if heads else []), []
    except InputError as reason:
        return [], [f"overlays: not drawn. {reason}"]


def strongest(atlas: Atlas, model: HookedModel, scores: Sequence[Score]) -> list[Head]:
    """The heads that rank highest by the score that is best drawn, of those that were measured."""
    for score in sorted((s for s in scores if s.drawn), key=lambda s: -s.drawn):
        if score.name in atlas.scores and atlas.frame[score.name].notna().any():
            return [h for h, _, _ in atlas.head_ranking(score.name, HEADS, model.main_tower)]
    return []


def check_drawn(scores: Sequence[Score]) -> None:
    """Raise `InputError` where no score ranks heads to be drawn for words."""
    if not any(s.drawn for s in scores):
        raise InputError(
            "Words are drawn under the heads that look at pictures most; scan for gaze, vhd or "
            "image_mass too."
        )
