"""A picture under its heads on the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.results.overlay import PictureOverlay

#: pixels of a figure's title, which the page's heading replaces
_TITLE = 48


@dataclass(frozen=True)
class OverlaySection:
    """A picture's part of the page: its element, its size in pixels, what it shows in a sentence,
    what was read, which word looks, and if there are visual sinks."""

    element: str
    height: int
    width: int
    label: str
    prompt: str
    token: str
    sinks: bool
    figures: Mapping[str, Any]


def of(overlay: PictureOverlay, element: str) -> OverlaySection:
    """The section of `overlay`, its figure in the element with this id."""
    figure = overlay.figure()
    height, width = int(figure.layout.height) - _TITLE, int(figure.layout.width)
    figure.update_layout(title=None, width=None, height=height, margin={"t": 32}, autosize=True)
    return OverlaySection(
        element,
        height,
        width,
        f"The picture, and the attention of the word {overlay.token} on it in the heads "
        f"{', '.join(overlay.heads)}.",
        overlay.prompt,
        overlay.token,
        any(layer.sinks for h in overlay.heads for layer in overlay.layers(h)),
        {element: json.loads(figure.to_json())},
    )
