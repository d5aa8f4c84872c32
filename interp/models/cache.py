"""The folder where fetched models are kept: where it is, what lies in it, one writer at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp.errors import ModelError, OutputError
from interp.support.files import reason
from interp.support.json_text import parse
from interp.support.tensor_digest import file_digest

#: beside the weights: where they come from
ORIGIN = "interp-origin.json"
#: beside them too: digests of the files, as they were written
DIGESTS = "interp-files.json"


@dataclass(frozen=True)
class Cached:
    """A model in the cache.

    Attributes:
        name: what `interp.load` takes.
        path: its folder.
        megabytes: what it takes on the disk.
        origin: where it comes from, as results record it.

    Example:
        >>> [model.megabytes for model in interp.models.cached() if model.name == "no-such-model"]
        []
    """

    name: str
    path: Path
    megabytes: int
    origin: dict[str, Any]


def root() -> Path:
    """The folder of fetched models: in ``INTERP_CACHE`` if that is set, else in the user's cache
    folder."""
    import platformdirs

    own = os.environ.get("INTERP_CACHE")
    cache = Path(own).expanduser() if own else Path(platformdirs.user_cache_dir("interp"))
    return cache / "models"


def folder(name: str) -> Path:
    """Where the model `name` is, or would be."""
    return root() / name


def is_complete(path: Path) -> bool:
    """Whether a folder of the cache holds a model. Folders get their names when they are whole."""
    return (path / "config.json").is_file() and (path / ORIGIN).is_file()


def seal(path: Path) -> None:
    """Write down what the files of a model's folder are, before it gets its name."""
    digests = {p.name: file_digest(p) for p in sorted(path.iterdir()) if p.name != DIGESTS}
    (path / DIGESTS).write_text(json.dumps(digests, indent=2), encoding="utf-8")


def check(path: Path) -> None:
    """Raise `ModelError` where a file of a fetched model is not as it was written: weights with a
    bit turned load without complaint, and give other numbers."""
    try:
        digests = parse((path / DIGESTS).read_text(encoding="utf-8"))
    except FileNotFoundError:  # fetched by an earlier version, or no fetched model
        return
    except (OSError, ValueError):
        digests = None
    bad = [DIGESTS] if not isinstance(digests, dict) else []
    for name, digest in (digests or {}).items() if not bad else ():
        try:
            # a name out of a file is a file of this folder, never a way out of it
            fits = Path(name).name == name and file_digest(path / name) == digest
        except OSError:
            fits = False
        bad += [] if fits else [name]
    if bad:
        raise ModelError(
            f"{', '.join(bad)} of {path.name} in the cache {root()} is damaged or missing; run "
            f"`interp models remove {path.name}` and fetch it again."
        )


def origin_of(path: Path) -> dict[str, Any]:
    """Where the weights in a folder come from, as it was written down when they were fetched; {}
    for other folders."""
    try:
        origin = parse((path / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return origin if isinstance(origin, dict) else {}


def cached() -> list[Cached]:
    """The models in the cache, by name.

    Example:
        >>> isinstance(interp.models.cached(), list)
        True
    """
    try:
        folders = sorted(p for p in root().iterdir() if is_complete(p))
    except OSError:
        return []
    return [Cached(p.name, p, size(p) // 1_000_000, origin_of(p)) for p in folders]


def remove(name: str) -> int:
    """Removes a fetched model from the cache, and what an interrupted fetch of it left.

    Args:
        name: as `cached` lists it.

    Returns:
        megabytes freed.

    Raises:
        ModelError: the cache has no such model.
        OutputError: the cache can't be written to.

    Example:
        >>> interp.models.remove("no-such-model")
        Traceback (most recent call last):
        interp.errors.ModelError: ...
    """
    target = folder(name)
    names = [model.name for model in cached()]
    kept = partial(name)
    # A name is one folder of the cache, never a way out of it.
    inside = re.fullmatch(r"\w[\w.-]*", name)
    if not inside or not (target.is_dir() or kept.is_dir()):
        there = f"it has {', '.join(names)}" if names else "it is empty"
        raise ModelError(f"The cache {root()} has no model called {name!r}; {there}.")
    with writing(name):
        freed = size(target) + size(kept)
        # Renamed first: whoever looks meanwhile sees the whole model or none.
        gone = temporary(name)
        if target.is_dir():
            target.rename(gone)
        for path in (gone, kept):
            if path.is_dir():
                shutil.rmtree(path)
    return freed // 1_000_000


def partial(name: str) -> Path:
    """Where the finished pieces of an unfinished fetch are kept, so that the next goes on."""
    return root() / f".{name}.partial"


def temporary(name: str) -> Path:
    """A name beside the model's folder for what is being written or removed."""
    return root() / f".{name}.{os.getpid()}.tmp"


def size(path: Path) -> int:
    """Bytes of the files in a folder; 0 where there is none."""
    total = 0
    # a download may remove its files and folders meanwhile: os.walk passes over those that are gone
    for folder, _, files in os.walk(path):
        for name in files:
            with suppress(OSError):
                total += os.path.getsize(os.path.join(folder, name))
    return total


@contextmanager
def writing(name: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """The cache, for one writer of the model `name` at a time; another process waits here.

    Args:
        name: the model.
        waiting: called once when another process is at it.

    Raises:
        OutputError: the cache can't be made or written to, in the block too.
    """
    import filelock

    place = root()
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(place / f".{name}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if waiting:
                waiting()
            lock.acquire()
        try:
            # Only a process that was killed leaves these, and no other is at work now.
            for left in place.glob(f".{name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            yield
        finally:
            lock.release()
    except OSError as error:
        raise OutputError(
            f"Can't write into the cache {place} ({reason(error)}); make room, or set INTERP_CACHE "
            "to a folder that can be written to."
        ) from error
