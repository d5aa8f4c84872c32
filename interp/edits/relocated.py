"""An edit with other heads in place of those that it names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from interp.edits.gate import Gate
from interp.edits.head_edit import HeadEdit
from interp.edits.seka import SEKA
from interp.errors import EditError
from interp_hooks.edit import Edit
from interp_hooks.heads import Head


def named_heads(edits: Iterable[Edit]) -> list[Head]:
    """The query heads that edits name, each once, layer by layer; none of an edit of all heads."""
    found = {h: None for edit in edits for h in getattr(edit, "concerned", None) or ()}
    return sorted(found)


def relocated(edit: HeadEdit, places: Mapping[Head, Head]) -> HeadEdit:
    """`edit` made anew with each head of `places` replaced: in its heads, and in what it says head
    by head.

    Raises `EditError` for edits whose heads are key/value heads.

    Example:
        >>> from interp.edits.relocated import relocated
        >>> edit = interp.edits.ScaleHeads({"L1H0": 2.0})
        >>> relocated(edit, {interp.Head(1, 0): interp.Head(1, 5)}).phrase
        'ScaleHeads L1H5; gains L1H5: 2'
    """
    if isinstance(edit, Gate | SEKA):
        raise EditError(
            f"{edit.name} names key/value heads, so that no query head stands in for one."
        )
    names = {str(head): str(other) for head, other in places.items()}

    def moved(name: str, value: Any) -> Any:
        if isinstance(value, Mapping) and names.keys() & value.keys():
            return {names.get(k, k): v for k, v in value.items()}
        if name == "heads" and isinstance(value, list | tuple):
            return [names.get(str(h), str(h)) for h in value]
        return value

    return type(edit).from_fields({k: moved(k, v) for k, v in edit.fields().items()})
