"""What other rooms give the report: sections, and figures as a page holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class Section(NamedTuple):
    """A part of the page that comes before the scores, or after them.

    Its element id, its heading; the template of what is under it (a path in `templates`) with the
    `values` that it names; and its figures, as `plotable` makes them, by the ids of the elements
    that the template has for them.
    """

    anchor: str
    title: str
    template: str
    values: Mapping[str, Any]
    figures: Mapping[str, Any]
    #: it stands after the scores
    after: bool = False


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
