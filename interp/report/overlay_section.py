"""A picture under its heads on the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp.report.heatmap import number
from interp.results.overlay import SCALE, Panel

if TYPE_CHECKING:
    from interp.results.overlay import PictureOverlay

#: digits of a weight on the page
DIGITS = 4


@dataclass(frozen=True)
class OverlaySection:
    """A picture's part of the page: its element, its heading, what it shows in a sentence, what was
    read, which word looks (and which word it is about to say), by which score the heads were
    chosen, the largest weight, if its weight on the first token is known, if there are visual
    sinks, and what the page's script draws."""

    element: str
    heading: str
    label: str
    prompt: str
    token: str
    word: str
    by: str
    top: str
    first: bool
    sinks: bool
    data: dict[str, Any]


def of(overlay: PictureOverlay, element: str) -> OverlaySection:
    """The section of `overlay`, drawn in the element with this id."""
    source, width, height = overlay.drawn()
    panels, top = overlay.panels(), overlay.top
    return OverlaySection(
        element,
        _heading(overlay),
        f"The picture, and the attention {overlay.looker} on it in the heads "
        f"{', '.join(overlay.heads)}.",
        overlay.prompt,
        overlay.token,
        overlay.word,
        overlay.by,
        number(top),
        bool(overlay.first),
        any(layer.sinks for h in overlay.heads for layer in overlay.layers(h)),
        dict(
            source=source,
            width=width,
            height=height,
            top=top,
            scale=SCALE,
            panels=[_panel(p) for p in panels],
        ),
    )


def _panel(panel: Panel) -> dict[str, Any]:
    return dict(
        title=panel.title,
        layers=[
            dict(
                box=list(layer.box),
                weights=[[float(f"{w:.{DIGITS}g}") for w in row] for row in layer.weights.tolist()],
                sinks=[list(at) for at in layer.sinks],
            )
            for layer in panel.layers
        ],
    )


def _heading(overlay: PictureOverlay) -> str:
    """Where heads look; for chosen words which word, and in which picture."""
    if not overlay.word:
        return "Where heads look"
    where = f", {overlay.shown}" if overlay.shown else ""
    return f"Where heads look for “{overlay.word}”{where}"
