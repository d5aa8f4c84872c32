"""One run at a time in a folder of results, without help of the file system."""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from interp.errors import OutputError
from interp.support.files import reason, sweep

#: the file in a folder that says whose it is now
LOCK = ".interp-lock.json"
#: tries to get a lock that others take and leave meanwhile
TRIES = 20
#: seconds after which a lock that says nothing is a dead run's
YOUNG = 4.0
#: folders that blocks around this one own, in this thread
_OWNED: ContextVar[frozenset[tuple[int, Path]]] = ContextVar("owned folders", default=frozenset())


@contextmanager
def owned(folder: str | os.PathLike[str] | None, passing: bool = False) -> Iterator[None]:
    """Owns a folder of results for the length of a block; it is made if need be.

    A file in it names process, start of the process, machine and date. It is made by linking a
    whole file, which is atomic on network file systems too, and needs no flock. What a process
    that died on this machine left is taken over; blocks in blocks of the same thread share it.

    Args:
        folder: which; None for results that are not saved.
        passing: the folder goes at the end, if nothing is in it, also where it was there before.

    Raises:
        OutputError: another run owns it, or it can't be written to.

    Example:
        >>> from interp.support.ownership import owned
        >>> with owned("results"), owned("results"):
        ...     pass
    """
    if folder is None:
        yield
        return
    place = Path(os.path.realpath(folder))
    here = os.getpid(), place  # a forked child owns nothing
    if here in _OWNED.get():
        yield
        return
    made = [p for p in (place, *place.parents) if not p.exists()]  # the innermost first
    mine = _about_me()
    _take(place, mine)
    token = _OWNED.set(_OWNED.get() | {here})
    try:
        sweep(place)
        yield
    finally:
        _OWNED.reset(token)
        with suppress(OSError):
            if os.getpid() == mine["pid"] and _read(place / LOCK) == mine:
                (place / LOCK).unlink()
        with suppress(OSError):  # there is something in it
            for empty in made or ([place] if passing else []):
                empty.rmdir()


def owner(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Who owns a folder now; None for nobody, for this thread, and for a process that died here."""
    place = Path(os.path.realpath(folder))
    about = None if (os.getpid(), place) in _OWNED.get() else _read(place / LOCK)
    return None if about is None or _is_stale(about) else about


def _take(place: Path, mine: dict[str, Any]) -> None:
    """Put one's own lock into a folder."""
    lock = place / LOCK
    written = json.dumps(mine).encode()
    draft = place / f"{LOCK}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        place.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(written)
        try:
            for _ in range(TRIES):
                if _link(draft, lock, written):
                    return
                other = _read(lock)
                if other is None:  # it is being left
                    continue
                if not other and _age(lock) < YOUNG:  # it is being written, where links are not
                    time.sleep(2 * YOUNG / TRIES)  # it is old before the tries are over
                    continue
                if not _is_stale(other):
                    raise OutputError(_busy(place, other))
                _remove_stale(lock, other)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"Can't write into {place} ({reason(error)}); choose another folder."
        ) from error
    raise OutputError(f"Other runs take {place} in turn; choose another folder.")


def _link(draft: Path, lock: Path, written: bytes) -> bool:
    """Give the draft the lock's name, unless there is one."""
    try:
        os.link(draft, lock)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: exclusive creation is the next best
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "wb") as file:
            file.write(written)
    return True


def _remove_stale(lock: Path, seen: dict[str, Any]) -> None:
    """Take a dead run's lock away; one that a third run has put there meanwhile is put back."""
    aside = lock.with_name(f"{lock.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        lock.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != seen:
        with suppress(OSError):
            os.link(aside, lock)
    aside.unlink(missing_ok=True)


def _read(lock: Path) -> dict[str, Any] | None:
    """What a lock says; {} for one that can't be understood, None where there is none."""
    try:
        about = json.loads(lock.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _age(lock: Path) -> float:
    """Seconds since a file was written; none for one that is gone."""
    try:
        return time.time() - lock.stat().st_mtime
    except OSError:
        return 0.0


def _about_me() -> dict[str, Any]:
    return dict(
        pid=os.getpid(),
        began=_began(os.getpid()),
        host=platform.node(),
        boot=_boot(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        token=uuid.uuid4().hex,
    )


def _is_stale(about: dict[str, Any]) -> bool:
    """Whether a lock's process is known to be dead. Of another machine's nothing is known."""
    if about.get("host") != platform.node():
        return not about  # what can't be read is nobody's
    if about.get("boot") != _boot():
        return True
    pid = about.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # someone else's
        pass
    return about.get("began") != _began(pid)


def _began(pid: int) -> str | None:
    """When a process began, as the system counts; None where that can't be told. A process that
    has ended and that nobody has waited for is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]


def _boot() -> str | None:
    """Which start of the machine this is; None where that can't be told."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _busy(place: Path, other: dict[str, Any]) -> str:
    here = other.get("host") == platform.node()
    who = f"process {other.get('pid')}" + ("" if here else f" on {other.get('host')}")
    hint = "" if here else f", or, if that run is dead, remove {place / LOCK}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        hint = ", and let one process of torchrun alone save what comes back" + hint
    return (
        f"Another run works in {place} ({who}, since {other.get('since')}); wait for it, choose "
        f"another --out{hint}."
    )
