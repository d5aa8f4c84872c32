"""Who reads the edits of a request: the floor above, which knows them by name.

An edit's JSON names it in a registry that others add to, and its fields mean what its class says; a
second reader here would be right until the first edit changed. So the reader is handed in, where
vLLM's entry point is called (`interp.serving.entry`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from interp_hooks.edit import Edit
from interp_vllm.errors import ServingError


class Reader(Protocol):
    """What is needed of edits as JSON."""

    def edit_of(self, entry: Mapping[str, Any]) -> Edit:
        """The edit that an object of JSON describes."""

    def fields_of(self, edit: Edit) -> dict[str, Any]:
        """The edit's JSON with every field, heads and spans in one spelling."""

    def span_of(self, text: str, tokenizer: Any, tokens: Sequence[int]) -> tuple[int, int] | None:
        """The tokens start … stop − 1 that spell `text` at its last place; None where none do."""


_USED: list[Reader] = []


def use(reader: Reader) -> None:
    """Edits of requests are read by `reader` in this process from now on."""
    _USED[:] = [reader]


def reader() -> Reader:
    """The reader in use. Raises `ServingError` where none was handed in."""
    if not _USED:
        raise ServingError(
            "Nobody reads edits in this process: it was not started through the entry point of "
            "interp (VLLM_PLUGINS must name interp, if it is set)."
        )
    return _USED[0]
