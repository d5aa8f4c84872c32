"""Writing results: checked before the work, atomic after it, one sentence when it fails."""

from __future__ import annotations

import errno
import glob
import os
import re
import threading
from contextlib import suppress
from pathlib import Path

from interp.errors import OutputError


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise `OutputError` unless files can be written into `folder`, which need not exist yet.

    Nothing is left behind: a probe file is made and removed in the nearest folder that exists.
    """
    target = Path(folder)
    existing = target
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(
            f"Can't write into {target}: {existing} is a file, not a folder; choose another --out."
        )
    try:
        _try_to_write(existing)
    except OSError as error:
        raise OutputError(
            f"Can't write into {target} ({reason(error)}); choose another folder."
        ) from error


def _try_to_write(folder: Path) -> None:
    """Make a file and remove it, one without a name where the system has such: a process that is
    killed meanwhile leaves nothing then."""
    nameless = getattr(os, "O_TMPFILE", None)
    if nameless is not None:
        try:
            os.close(os.open(folder, nameless | os.O_WRONLY, 0o600))
            return
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT):
                raise
    probe = folder / f".interp-write-test-{os.getpid()}.tmp"
    probe.touch(exist_ok=True)
    probe.unlink()


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old or the whole new one; its folder is made if need
    be.

    Raises `OutputError` when it can't be written.
    """
    # Not tempfile: its files are private (0600) and would stay so after the rename.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"Can't write {path} ({reason(error)}); choose another place or make room."
        ) from error


def sweep(folder: Path, stem: str = "") -> None:
    """Remove what killed processes left half written in a folder that no other run works in: all
    temporary files, or those of files whose names begin with `stem`."""
    with suppress(OSError):
        for path in folder.glob(f".{glob.escape(stem)}*.tmp"):
            if path.is_file():
                path.unlink(missing_ok=True)


def reason(error: OSError) -> str:
    """What the system says was wrong, in lower case."""
    return os.strerror(error.errno).lower() if error.errno is not None else str(error)


def folder_name(*names: str) -> str:
    """Names as one folder: "meta-llama/Llama-3.1-8B" → "meta-llama--Llama-3.1-8B"; several are
    joined by a dash."""
    flat = (name.strip("/\\").replace("/", "--").replace("\\", "--") for name in names)
    return "-".join(re.sub(r"[^\w.\-]+", "-", name).strip(".-") or "model" for name in flat)
