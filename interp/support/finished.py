"""What lies in a place where a result is to go: nothing is replaced without being asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from interp.errors import OutputError
from interp.support.checkpoints import MARK
from interp.support.fingerprint import fingerprint
from interp.support.ownership import owner
from interp.support.provenance import differences, identity


def check_replaceable(head: Path, record: Mapping[str, Any], overwrite: bool = False) -> None:
    """Raises `OutputError` where a finished result of another run lies, unless it may be replaced.

    Args:
        head: the JSON file that holds a result's provenance.
        record: the provenance of the result that is to go there.
        overwrite: replace it.
    """
    if overwrite or not head.exists():
        return
    other = _provenance(head)
    if other is not None and other.get("fingerprint") == record["fingerprint"]:
        return
    what = "is not known to be of this run"
    if other is not None:
        names = differences(identity(record), identity(other))
        what = f"is of another run (other {names})" if names else "is of another version"
    _refuse(head, what)


def check_early(head: Path, overwrite: bool, model: str, seed: int, **settings: Any) -> None:
    """The same before a run, from what is known of it by then: so that nobody waits in vain."""
    other = None if overwrite else _provenance(head)
    if other is None:
        return
    theirs = {**(other.get("settings") or {}), **other}
    mine = {"model": model, "seed": seed, **settings}
    if names := ", ".join(key for key, value in mine.items() if theirs.get(key) != value):
        _refuse(head, f"is of another run (other {names})")


def _refuse(head: Path, what: str) -> NoReturn:
    raise OutputError(
        f"{head} is there already and {what}; choose another --out, or add --overwrite "
        "(overwrite=True) to replace it."
    )


def vacant(folder: Path, head: str, record: Mapping[str, Any]) -> Path:
    """`folder`, or where another run's result or pieces lie there, or another run works there, the
    same with the first 8 digits of this run's fingerprint.

    Args:
        folder: the usual place.
        head: name of the JSON file in it that holds a result's provenance.
        record: the provenance of this run.
    """
    mine = record["fingerprint"]
    named = folder.with_name(f"{folder.name}-{mine[:8]}")
    if named.exists():
        return named
    there = []
    if (folder / head).exists():
        there.append((_provenance(folder / head) or {}).get("fingerprint"))
    if (folder / "partial" / MARK).exists():
        there.append(_unfinished(folder))
    if owner(folder) is not None and not there:
        there.append(None)
    return folder if all(one == mine for one in there) else named


def is_unfinished(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether pieces of this very run lie in a folder: it was broken off, perhaps while saving."""
    return _unfinished(folder) == record["fingerprint"]


def _unfinished(folder: Path) -> str | None:
    """The fingerprint of the run whose pieces lie in a folder; None where that can't be told."""
    try:
        return fingerprint(json.loads((folder / "partial" / MARK).read_bytes()))
    except (OSError, ValueError):
        return None


def _provenance(head: Path) -> dict[str, Any] | None:
    """The provenance in a result's head; None where there is none to be read."""
    try:
        content = json.loads(head.read_bytes())
    except (OSError, ValueError):
        return None
    found = content.get("provenance") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else None
