"""Writing results: checked before the work, atomic after it, one sentence when it fails."""

from __future__ import annotations

import os
import re
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
    probe = existing / f".interp-write-test-{os.getpid()}"
    try:
        probe.touch(exist_ok=True)
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"Can't write into {target} ({reason(error)}); choose another folder."
        ) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old or the whole new one; its folder is made if need
    be.

    Raises `OutputError` when it can't be written.
    """
    # Not tempfile: its files are private (0600) and would stay so after the rename.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def reason(error: OSError) -> str:
    """What the system says was wrong, in lower case."""
    return os.strerror(error.errno).lower() if error.errno is not None else str(error)


def folder_name(*names: str) -> str:
    """Names as one folder: "meta-llama/Llama-3.1-8B" → "meta-llama--Llama-3.1-8B"; several are
    joined by a dash."""
    flat = (name.strip("/\\").replace("/", "--").replace("\\", "--") for name in names)
    return "-".join(re.sub(r"[^\w.\-]+", "-", name).strip(".-") or "model" for name in flat)
