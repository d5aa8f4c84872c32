"""Finished pieces of a run on disk, so that an interrupted one resumes."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from interp.errors import OutputError
from interp.support.files import reason, sweep, write_atomic
from interp.support.fingerprint import fingerprint
from interp.support.provenance import differences, identity

#: the file that says what the pieces are of
MARK = "fingerprint.json"


class Record(NamedTuple):
    """One score of one head in one sample."""

    score: str
    sample: int
    tower: str
    kind: str
    layer: int
    head: int
    value: float


class Piece(NamedTuple):
    """A part of a run that can be done in any order: its key, what it is in words, the seconds it
    may take, and whether its records are saved under the key."""

    key: str
    label: str
    seconds: float
    saved: bool = True


class Checkpoints:
    """`folder/partial/KEY.DIGEST.parquet` for each finished piece of a run.

    A piece carries the digest of its bytes in its name, and inside its key and the fingerprint of
    its run; what is damaged or of another run (model, inputs, settings, code or versions) is no
    piece of this one and is removed, which `notes` tells. Without a folder the pieces are kept in
    memory. Who writes into a folder owns it meanwhile (`ownership.owned`).

    Args:
        folder: of the results; None for memory.
        record: where the results come from, as `provenance` gives it.
    """

    def __init__(self, folder: Path | None, record: Mapping[str, Any]):
        self._memory: dict[str, Any] = {}
        self._damaged: set[str] = set()
        self._removed = ""
        self.folder = None if folder is None else Path(folder) / "partial"
        about = identity(record)
        self._run = fingerprint(about)
        if self.folder is None:
            return
        written = json.dumps(about, sort_keys=True, indent=1).encode()
        mark = self.folder / MARK
        sweep(self.folder)
        try:
            fits = mark.read_bytes() == written
        except OSError:
            fits = False
        if not fits:
            self._discard(mark, about)
        write_atomic(mark, written)

    def _discard(self, mark: Path, about: dict[str, Any]) -> None:
        """Remove pieces of another run, and remember what is to be said of them."""
        assert self.folder is not None
        pieces = len(list(self.folder.glob("*.parquet")))
        try:
            other = json.loads(mark.read_bytes())
        except (OSError, ValueError):
            other = None
        if pieces:
            what = "nothing says of what run they are"
            if isinstance(other, dict) and (names := differences(about, other)):
                what = f"other {names}"
            self._removed = (
                f"Finished pieces in {self.folder} did not fit this run ({what}): {pieces} removed."
            )
        self.clear()

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the pieces that were there and could not be used."""
        if self._damaged:
            names = ", ".join(sorted(self._damaged))
            damaged = [f"Measured again, for what was saved of them was damaged: {names}."]
        else:
            damaged = []
        return [*([self._removed] if self._removed else []), *damaged]

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """A block whose interrupt says where finished pieces are kept."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            if count := self.kept:
                interrupt.args = (
                    f"Interrupted; what is finished ({count} piece{'s' if count > 1 else ''}) is "
                    f"kept in {self.folder}: run the same command again to resume.",
                )
            raise

    @property
    def kept(self) -> int:
        """How many pieces lie on disk."""
        if self.folder is None or not self.folder.is_dir():
            return 0
        return len(list(self.folder.glob("*.parquet")))

    def has(self, key: str) -> bool:
        """Whether this piece is finished; a damaged one is not."""
        return self._piece(key) is not None

    def save(self, key: str, records: Sequence[Record]) -> None:
        """Keep the records of a finished piece.

        Raises:
            OutputError: they can't be written.
        """
        import pandas as pd

        frame = pd.DataFrame(records, columns=Record._fields)
        if self.folder is None:
            self._memory[key] = frame
            return
        frame.attrs = {"run": self._run, "key": key}
        table = io.BytesIO()
        frame.to_parquet(table)
        raw = table.getvalue()
        new = self.folder / f"{_file_name(key)}.{_digest(raw)}.parquet"
        write_atomic(new, raw)  # a piece is there whole or not at all
        for old in self._files(key):
            if old != new:
                old.unlink(missing_ok=True)

    def records(self, keys: Sequence[str]) -> Any:
        """All pieces, in the order of `keys`: the same frame whether run at once or in parts.

        Raises:
            OutputError: a piece is missing or damaged.
        """
        import pandas as pd

        parts = [self._piece(key) for key in keys]
        for key, part in zip(keys, parts, strict=True):
            if part is None:
                raise OutputError(
                    f"The piece {key} in {self.folder} is missing or damaged; run the same again."
                )
        if not parts:
            return pd.DataFrame([], columns=Record._fields)
        return pd.concat(parts, ignore_index=True)

    def _files(self, key: str) -> list[Path]:
        """The files of a piece: one, unless a process was killed while it wrote another."""
        assert self.folder is not None
        start = f"{_file_name(key)}."
        if not self.folder.is_dir():
            return []
        return [
            path
            for path in sorted(self.folder.iterdir())
            if path.name.startswith(start)
            and re.fullmatch(r"[0-9a-f]{16}\.parquet", path.name[len(start) :])
        ]

    def _piece(self, key: str) -> Any:
        """A piece's frame; None where it is missing, damaged or another run's."""
        if self.folder is None:
            return self._memory.get(key)
        files = self._files(key)
        for path in files:
            frame = self._read(path, key)
            if frame is not None:
                return frame
        if files:
            self._damaged.add(key)
        return None

    def _read(self, path: Path, key: str) -> Any:
        import pandas as pd

        try:
            raw = path.read_bytes()
            if _digest(raw) != path.name.split(".")[-2]:  # before a parser sees it
                return None
            frame = pd.read_parquet(io.BytesIO(raw))
        except (OSError, ValueError, TypeError, LookupError, NotImplementedError):
            return None  # pyarrow has many
        if frame.attrs != {"run": self._run, "key": key}:
            return None
        frame.attrs = {}
        return frame if tuple(frame.columns) == Record._fields else None

    def clear(self) -> None:
        """Remove the pieces.

        Raises:
            OutputError: they can't be removed.
        """
        if self.folder is None or not self.folder.is_dir():
            return
        try:
            # what says whose the pieces are goes last, or those left by a kill would be nobody's
            for path in sorted(self.folder.iterdir(), key=lambda p: p.name == MARK):
                if path.is_file() or path.is_symlink():
                    path.unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
        except OSError as error:
            raise OutputError(
                f"Can't remove the pieces in {self.folder} ({reason(error)}); remove them by hand."
            ) from error


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _file_name(key: str) -> str:
    """A key as a file's name: scores and probes of others may have any."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", key):
        return key
    return "key-" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]
