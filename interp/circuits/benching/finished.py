"""Rows of methods that a bench has finished, on disk, so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from interp.support.files import write_atomic
from interp.support.fingerprint import fingerprint
from interp.support.provenance import identity


class FinishedRows:
    """`folder/partial/METHOD.RUN.DIGEST.parquet`: RUN is of all that shapes the rows (weights,
    prompts, settings, code, truths), DIGEST of the file's bytes; what has others is not read.

    Args:
        folder: of the bench; None keeps nothing.
        about: what all rows hang on, beside the record of each search.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, *about: Any):
        self.folder = None if folder is None else Path(folder) / "partial"
        self._about = about

    def read(self, label: str, record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """The rows of a method; None where they are not there, or not whole."""
        if self.folder is None:
            return None
        stem = self._stem(label, record)
        for path in self.folder.glob(f"{stem}.*.parquet"):
            data = path.read_bytes()
            if path.name == self._name(stem, data):
                return pd.read_parquet(io.BytesIO(data)).to_dict("records")
            path.unlink()
        return None

    def save(self, label: str, record: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        """Keep the rows of a method. Raises `OutputError`."""
        if self.folder is None:
            return
        table = io.BytesIO()
        pd.DataFrame(rows).to_parquet(table, index=False)
        data = table.getvalue()
        write_atomic(self.folder / self._name(self._stem(label, record), data), data)

    def clear(self) -> None:
        """Remove what was kept: the result holds it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _stem(self, label: str, record: Mapping[str, Any]) -> str:
        run = fingerprint(label, identity(record), *self._about)
        return f"{re.sub(r'[^A-Za-z0-9]+', '-', label)}.{run[:16]}"

    def _name(self, stem: str, data: bytes) -> str:
        return f"{stem}.{hashlib.sha256(data).hexdigest()[:16]}.parquet"
