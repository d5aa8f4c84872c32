"""An edit with other heads in place of those that it names."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from interp.edits.gate import Gate
from interp.errors import EditError
from interp_hooks.edit import Edit
from interp_hooks.heads import Head


def named_heads(edits: Iterable[Edit]) -> list[Head]:
    """The query heads that edits name, each once, layer by layer; none of an edit of all heads."""
    found = {h: None for edit in edits for h in getattr(edit, "concerned", None) or ()}
    return sorted(found)


def relocated(edit: Any, places: Mapping[Head, Head]) -> Any:
    """`edit` with each head of `places` replaced: in its heads, and in what it says head by head.

    Raises `EditError` for `Gate`, whose heads are key/value heads.

    Example:
        >>> from interp.edits.relocated import relocated
        >>> edit = interp.edits.ScaleHeads({"L1H0": 2.0})
        >>> relocated(edit, {interp.Head(1, 0): interp.Head(1, 5)}).phrase
        'ScaleHeads L1H5; gains L1H5: 2'
    """
    if isinstance(edit, Gate):
        raise EditError("gate names key/value heads, so that no query head stands in for one.")
    moved = copy.copy(edit)
    for field in dataclasses.fields(edit):
        value = getattr(edit, field.name)
        if isinstance(value, Mapping) and any(isinstance(k, Head) for k in value):
            object.__setattr__(moved, field.name, {places.get(k, k): v for k, v in value.items()})
        elif field.name == "heads" and isinstance(value, tuple):
            object.__setattr__(moved, "heads", tuple(places.get(h, h) for h in value))
    return moved
