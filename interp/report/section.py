"""What other rooms give the report: sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Section(NamedTuple):
    """A part of the page that comes before the scores, or after them.

    Its element id, its heading, and the template of what is under it (a path in `templates`) with
    the `values` that it names.
    """

    anchor: str
    title: str
    template: str
    values: Mapping[str, Any]
    #: it stands after the scores
    after: bool = False
