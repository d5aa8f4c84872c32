"""vLLM's entry point: this toolkit's edits, for its plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from interp_hooks.edit import Edit


class EditReader:
    """Edits of requests by `interp.edits`, which is imported when the first one comes."""

    def edit_of(self, entry: Mapping[str, Any]) -> Edit:
        """The edit that an object of JSON describes. Raises as `interp.edits.from_json` does."""
        from interp.edits import from_json

        return from_json(dict(entry))[0]

    def fields_of(self, edit: Edit) -> dict[str, Any]:
        """The edit's JSON with every field, heads and spans in one spelling."""
        from interp.edits import to_json

        return to_json([edit])[0]  # type: ignore[list-item]

    def span_of(self, text: str, tokenizer: Any, tokens: Sequence[int]) -> tuple[int, int] | None:
        """The tokens start … stop − 1 that spell `text` at its last place; None where none do."""
        from interp.edits.prompt_text import locate

        return locate(tokenizer, tokens, text)


def register() -> None:
    """Called by vLLM in every process of an engine, once or more."""
    from interp_vllm import plugin, reading

    reading.use(EditReader())
    plugin.register()
