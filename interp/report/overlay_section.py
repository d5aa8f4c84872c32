"""A picture under its heads on the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp.results.overlay import ABOVE

if TYPE_CHECKING:
    from interp.results.overlay import PictureOverlay

#: pixels above the panels, for their lines and plotly's buttons: the page's heading replaces the
#: figure's title
_ABOVE = 64


@dataclass(frozen=True)
class OverlaySection:
    """A picture's part of the page: its element, its heading, its size in pixels, what it shows in
    a sentence, what was read, which word looks (and which word it is about to say), if its weight
    on the first token is known, and if there are visual sinks."""

    element: str
    heading: str
    height: int
    width: int
    label: str
    prompt: str
    token: str
    word: str
    first: bool
    sinks: bool
    figures: Mapping[str, Any]


def of(overlay: PictureOverlay, element: str) -> OverlaySection:
    """The section of `overlay`, its figure in the element with this id."""
    figure = overlay.figure()
    height, width = int(figure.layout.height) - ABOVE + _ABOVE, int(figure.layout.width)
    figure.update_layout(title=None, width=None, height=height, margin={"t": _ABOVE}, autosize=True)
    return OverlaySection(
        element,
        _heading(overlay),
        height,
        width,
        f"The picture, and the attention {overlay.looker} on it in the heads "
        f"{', '.join(overlay.heads)}.",
        overlay.prompt,
        overlay.token,
        overlay.word,
        bool(overlay.first),
        any(layer.sinks for h in overlay.heads for layer in overlay.layers(h)),
        {element: json.loads(figure.to_json())},
    )


def _heading(overlay: PictureOverlay) -> str:
    """Where heads look; for chosen words which word, and in which picture."""
    if not overlay.word:
        return "Where heads look"
    where = f", {overlay.shown}" if overlay.shown else ""
    return f"Where heads look for “{overlay.word}”{where}"
