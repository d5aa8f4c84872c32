"""One run at a time in a folder: who comes second is told, and the dead own nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from interp.errors import OutputError
from interp.support import ownership
from interp.support.ownership import LOCK, owned, owner


def in_child(work: Callable[[], Any], kill: bool = False) -> int:
    """Do something in a forked process, which is killed afterwards or ends with 0; its id."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            work()
            os.write(write, b"x")
            if kill:
                time.sleep(60)
            os._exit(0)
        os._exit(1)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    if kill:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert kill or status == 0
    return pid


HELD: list[Any] = []


def hold(place: Path) -> None:
    """Enter a block that is never left."""
    HELD.append(owned(place))
    HELD[-1].__enter__()


def refuse(place: Path) -> None:
    with pytest.raises(OutputError, match=f"Another run works in {place}.*process"):
        hold(place)


def test_the_second_is_told_and_the_first_goes_on(tmp_path: Path) -> None:
    place = tmp_path / "scans" / "out"
    with owned(place), owned(place):  # a block in a block of the same run
        assert owner(place) is None  # nobody else
        in_child(lambda: refuse(place))
        thread = threading.Thread(target=refuse, args=[place])
        thread.start()
        thread.join()
        assert (place / LOCK).is_file()
    assert not (tmp_path / "scans").exists()  # empty, and made for this
    in_child(lambda: hold(place))


def test_an_error_in_the_block_leaves_no_lock(tmp_path: Path) -> None:
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), owned(tmp_path):
            raise error
        assert list(tmp_path.iterdir()) == []


def test_a_killed_run_owns_nothing(tmp_path: Path) -> None:
    (tmp_path / ".atlas.json.99.99.tmp").write_text("half")
    in_child(lambda: hold(tmp_path), kill=True)
    assert (tmp_path / LOCK).is_file() and owner(tmp_path) is None
    with owned(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [LOCK]  # what was half written is gone
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({}, False),
        ({"began": "1"}, True),  # another process of the same number
        ({"boot": "another"}, True),  # the machine was started since
        ({"pid": 0}, True),
        ({"host": "elsewhere"}, False),  # nobody knows
    ],
)
def test_whose_a_lock_is(change: dict[str, Any], free: bool, tmp_path: Path) -> None:
    about = {**ownership._about_me(), **change}
    (tmp_path / LOCK).write_text(json.dumps(about))
    if free:
        with owned(tmp_path):
            pass
    else:
        says = "remove" if "host" in change else "process"
        with pytest.raises(OutputError, match=says):
            hold(tmp_path)
        assert json.loads((tmp_path / LOCK).read_text()) == about


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]"])
def test_a_lock_that_says_nothing(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Young, it may be being written where there are no links; old, it is a dead run's."""
    monkeypatch.setattr(ownership, "YOUNG", 0.2)
    (tmp_path / LOCK).write_bytes(content)
    start = time.time()
    with owned(tmp_path):
        assert time.time() - start >= 0.1
    assert list(tmp_path.iterdir()) == []


def test_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", none)
    with owned(tmp_path):
        in_child(lambda: refuse(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Can't write into"):
        hold(tmp_path / "file" / "x")


def test_many_at_once_own_it_in_turn(tmp_path: Path) -> None:
    """Of processes that try together, over a dead one's lock, never two are inside."""
    place, seen = tmp_path / "out", tmp_path / "seen"
    place.mkdir()
    seen.mkdir()
    in_child(lambda: hold(place), kill=True)
    children = []
    for i in range(6):
        pid = os.fork()
        if pid == 0:
            code = 1
            with suppress(OutputError), owned(place):
                (seen / f"{i}-in").write_text(str(time.monotonic()))
                time.sleep(0.05)
                (seen / f"{i}-out").write_text(str(time.monotonic()))
                code = 0
            os._exit(code)
        children.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in children]
    assert 0 in codes
    times = sorted(
        (float((seen / f"{i}-in").read_text()), float((seen / f"{i}-out").read_text()))
        for i, code in enumerate(codes)
        if code == 0
    )
    assert all(out < start for (_, out), (start, _) in pairwise(times))
