"""Finished pieces of a scan on disk, so that an interrupted one resumes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from interp.files import write_atomic


class Record(NamedTuple):
    """One score of one head in one sample."""

    score: str
    sample: int
    tower: str
    kind: str
    layer: int
    head: int
    value: float


class Partial:
    """`folder/partial/<job>.parquet` for each finished job, and the fingerprint of the scan they belong to.

    Pieces of a scan with another fingerprint (other model, inputs or settings) are discarded. Without a folder the
    pieces are kept in memory.
    """

    def __init__(self, folder: Path | None, fingerprint: dict[str, Any]):
        self._memory: dict[str, Any] = {}
        self.folder = None if folder is None else Path(folder) / "partial"
        if self.folder is None:
            return
        written = json.dumps(fingerprint, sort_keys=True)
        mark = self.folder / "fingerprint.json"
        if mark.is_file() and mark.read_text(encoding="utf-8") != written:
            self.clear()
        write_atomic(mark, written.encode())

    def has(self, key: str) -> bool:
        return key in self._memory or (self.folder is not None and (self.folder / f"{key}.parquet").is_file())

    def save(self, key: str, records: Sequence[Record]) -> None:
        import pandas as pd

        frame = pd.DataFrame(records, columns=Record._fields)
        if self.folder is None:
            self._memory[key] = frame
            return
        table = io.BytesIO()
        frame.to_parquet(table)
        write_atomic(self.folder / f"{key}.parquet", table.getvalue())  # a piece is there whole or not at all

    def records(self, keys: Sequence[str]) -> Any:
        """All pieces, in the order of `keys`: the same frame whether run at once or in parts."""
        import pandas as pd

        parts = [
            self._memory[k] if self.folder is None else pd.read_parquet(self.folder / f"{k}.parquet") for k in keys
        ]
        return pd.concat(parts, ignore_index=True)

    def clear(self) -> None:
        """Remove the pieces."""
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()
