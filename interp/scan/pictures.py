"""Where the strongest heads look: which pictures a scan draws under which heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
    heads, by = strongest(atlas, model, scores)
    notes: list[str] = []
    if settings.words is not None and heads:
        made, notes = word_overlays(model, settings.pictures, settings.words, heads)
    elif settings.words is not None:
        return [], ["words: nothing is drawn, for no score that ranks heads was measured."]
    else:
        try:
            made = probes.get("image").overlays(model, settings, heads) if heads else []
        except InputError as reason:
            return [], [f"overlays: not drawn. {reason}"]
    return [replace(one, by=by) for one in made], notes  # type: ignore[type-var]


def strongest(atlas: Atlas, model: HookedModel, scores: Sequence[Score]) -> tuple[list[Head], str]:
    """The heads that rank highest by the score that is best drawn, of those that were measured, and
    that score's title."""
    for score in sorted((s for s in scores if s.drawn), key=lambda s: -s.drawn):
        if score.name in atlas.scores and atlas.frame[score.name].notna().any():
            ranked = atlas.head_ranking(score.name, HEADS, model.main_tower)
            return [h for h, _, _ in ranked], score.title
    return [], ""


def check_drawn(scores: Sequence[Score]) -> None:
    """Raise `InputError` where no score ranks heads to be drawn for words."""
    if not any(s.drawn for s in scores):
        raise InputError(
            "Words are drawn under the heads that look at pictures most; scan for gaze, "
            "image_excess or image_mass too."
        )
