"""Edits from the JSON of a request.

The one file of this floor that looks up: an edit's JSON names it in a registry that others add to,
and its fields mean what its class says. A second reader here would be right until the first edit
changed. `interp` is in the same distribution, and is imported when the first edit comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from interp_hooks.edit import Edit


def edit_of(entry: Mapping[str, Any]) -> Edit:
    """The edit that an object of JSON describes. Raises as `interp.edits.from_json` does."""
    from interp.edits import from_json

    return from_json(dict(entry))[0]


def fields_of(edit: Edit) -> dict[str, Any]:
    """The edit's JSON with every field, heads and spans in one spelling."""
    from interp.edits import to_json

    return to_json([edit])[0]  # type: ignore[list-item]


def span_of(text: str, tokenizer: Any, tokens: Sequence[int]) -> tuple[int, int] | None:
    """The tokens start … stop − 1 that spell `text` at its last place; None where none do."""
    from interp.edits.prompt_text import locate

    return locate(tokenizer, tokens, text)
