"""A format of score files: how it is recognised, read and written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from interp.errors import InputError
from interp.results.interchange.entries import Entries


class FileFormat(ABC):
    """The base class of formats; `interp.results.interchange.catalogue` has a line for each.

    Subclasses set `name`, `what` (a phrase) and `score` (what a score of it is called), and define
    `claims`, `read` and, unless the format is only read, `write`.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    score: ClassVar[str] = "score"

    @abstractmethod
    def claims(self, content: Any) -> bool:
        """Whether the content, JSON data or rows of text cells (`Rows`), looks like this format."""

    @abstractmethod
    def read(self, content: Any) -> Entries:
        """What the content says. Raises `InputError` where something is wrong with it."""

    def write(self, entries: Entries) -> str:
        """The text of a file. Raises `InputError` for what the format can't hold; all of it, unless
        a subclass says otherwise."""
        raise InputError(f"The format {self.name} is read and not written; choose another.")

    def refuse_kv_heads(self, entries: Entries) -> None:
        """Raise `InputError` for a score of key/value heads, which most formats can't name."""
        if entries.grain != "head":
            raise InputError(
                f"{self.what} names query heads, and {entries.score} is a score of key/value "
                'heads; write it with format="duo".'
            )


@dataclass(frozen=True)
class Rows:
    """Text that is not JSON: lines of cells between tabs, commas or blanks."""

    lines: list[list[str]]
