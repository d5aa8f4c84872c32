"""What other rooms give the report: sections of HTML, and figures as a page holds them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Section(NamedTuple):
    """A part of the page that comes first: its element id, its heading, what is under it as HTML
    (escaped already), and its figures by the ids of the elements that the HTML has for them, as
    `plotable` makes them."""

    anchor: str
    title: str
    html: str
    figures: dict[str, Any]


def plotable(figure: Any, above: int = 48) -> dict[str, Any]:
    """A figure for the page, as JSON: the page has a heading of its own and is as wide as the
    reader's window, so the title, `above` pixels high, and the width go."""
    figure.update_layout(
        title=None,
        width=None,
        height=figure.layout.height - above,
        margin={"t": figure.layout.margin.t - above},
        autosize=True,
    )
    return dict(json.loads(figure.to_json()))
