"""A score file written from the numbers of a table."""

from __future__ import annotations

from pathlib import Path

from interp.errors import InputError
from interp.results.interchange.entries import Entries
from interp.results.interchange.file_format import FileFormat
from interp.results.interchange.tables import strongest
from interp.support.files import write_atomic


def write(path: Path, entries: Entries, format: FileFormat, k: int | None = None) -> Path:
    """Writes the numbers of one score in a format.

    Args:
        path: the file.
        entries: the numbers.
        format: the format.
        k: of a list, how many of the strongest heads; None for all that are 1.

    Raises:
        InputError: the format can't hold them, or there are none.
        OutputError: it can't be written.
    """
    if not entries.values:
        raise InputError(f"{entries.score} was measured in no head, so there is nothing to write.")
    if k is not None and format.name != "pasta":
        raise InputError('k is for lists of heads, format="pasta"; other formats have all of them.')
    text = format.write(entries if k is None else strongest(entries, k))
    write_atomic(path, text.encode())
    return path
