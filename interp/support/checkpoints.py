"""Finished pieces of a scan on disk, so that an interrupted one resumes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from interp.errors import OutputError
from interp.support.files import write_atomic


class Record(NamedTuple):
    """One score of one head in one sample."""

    score: str
    sample: int
    tower: str
    kind: str
    layer: int
    head: int
    value: float


class Checkpoints:
    """`folder/partial/<job>.parquet` for each finished job, and the fingerprint of the scan they
    belong to.

    Pieces of a scan with another fingerprint (other model, inputs or settings) are discarded.
    Without a folder the pieces are kept in memory.
    """

    def __init__(self, folder: Path | None, fingerprint: dict[str, Any]):
        self._memory: dict[str, Any] = {}
        self.folder = None if folder is None else Path(folder) / "partial"
        if self.folder is None:
            return
        written = json.dumps(fingerprint, sort_keys=True).encode()
        mark = self.folder / "fingerprint.json"
        if mark.is_file() and mark.read_bytes() != written:
            self.clear()
        write_atomic(mark, written)

    def has(self, key: str) -> bool:
        """Whether this piece is finished; a damaged one is not."""
        return self._piece(key) is not None

    def save(self, key: str, records: Sequence[Record]) -> None:
        import pandas as pd

        frame = pd.DataFrame(records, columns=Record._fields)
        if self.folder is None:
            self._memory[key] = frame
            return
        table = io.BytesIO()
        frame.to_parquet(table)
        write_atomic(
            self.folder / f"{key}.parquet", table.getvalue()
        )  # a piece is there whole or not at all

    def records(self, keys: Sequence[str]) -> Any:
        """All pieces, in the order of `keys`: the same frame whether run at once or in parts.

        Raises `OutputError` for a piece that is missing or damaged.
        """
        import pandas as pd

        parts = [self._piece(key) for key in keys]
        for key, part in zip(keys, parts, strict=True):
            if part is None:
                raise OutputError(
                    f"The piece {key} in {self.folder} is missing or damaged; run the same again."
                )
        return pd.concat(parts, ignore_index=True)

    def _piece(self, key: str) -> Any:
        """A piece's frame; None where it is missing or damaged."""
        import pandas as pd

        if self.folder is None:
            return self._memory.get(key)
        try:
            frame = pd.read_parquet(self.folder / f"{key}.parquet")
        except (
            OSError,
            ValueError,
            TypeError,
            LookupError,
            NotImplementedError,
            MemoryError,
        ):  # pyarrow has many
            return None
        return frame if tuple(frame.columns) == Record._fields else None

    def clear(self) -> None:
        """Remove the pieces."""
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()
