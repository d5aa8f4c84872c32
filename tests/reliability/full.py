"""Run what saves on disks that are full or read-only, then give room, resume and compare.

    python -m tests.reliability.full --sizes 12        # as root, on Linux: it mounts small tmpfs

Each command runs on a tmpfs of a share of the room that it needs, from nearly none to nearly all,
in `--sizes` steps; then on one that is read-only from the start, and on one that is full in the
middle and read-only after. It must end in one sentence (an `OutputError`) or in the right result,
with no file under a final name that does not load. With room it must then give the uninterrupted
run's result in every bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.reliability.kill import Command, child, commands, faults, left_over, uninterrupted

#: bytes that are room enough
ROOM = 1 << 26


def mount(place: Path, size: int) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", str(place)], check=True
    )


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def run(command: Command, place: Path, said: Path) -> tuple[str | None, str]:
    """(digest or None, the last line of the error)."""
    said.unlink(missing_ok=True)
    error = said.with_suffix(".error")
    error.unlink(missing_ok=True)
    os.waitpid(child(command.run, place, said), 0)
    result = said.read_text() if said.exists() else None
    lines = error.read_text().strip().splitlines() if error.exists() else [""]
    return result, lines[-1]


def trial(command: Command, wanted: str, size: int, how: str) -> Counter[str]:
    """One disk: what a run on it did, and the run after it, counted."""
    counts: Counter[str] = Counter({"runs": 1})
    folder = Path(tempfile.mkdtemp(prefix=f"full-{command.name}-"))
    disk, said = folder / "disk", folder / "said"
    disk.mkdir()
    mount(disk, size)
    try:
        place = disk / "out"
        place.mkdir()
        if how == "read-only":
            remount(disk, f"ro,size={ROOM}")
        result, error = run(command, place, said)
        if how == "read-only after":
            remount(disk, f"ro,size={ROOM}")
            result, error = run(command, place, said)
        counts["done all the same"] += result == wanted
        counts["refused in a sentence"] += result is None and "OutputError: " in error
        counts["wrong numbers"] += result not in (None, wanted)
        traceback = result is None and "OutputError: " not in error
        counts["traceback"] += traceback
        bad = faults(place)
        counts["half a file under a final name"] += bool(bad)
        if traceback or bad:
            print(f"{command.name}, {size} bytes: {error} {bad}", flush=True)
        remount(disk, f"rw,size={ROOM}")
        again, error = run(command, place, said)
        counts["equal to the bit with room"] += again == wanted == command.saved(place)
        rest = left_over(place)
        counts["something left over"] += bool(rest)
        if again != wanted or rest:
            print(f"{command.name}, {size} bytes, with room: {error} {rest}", flush=True)
    finally:
        subprocess.run(["umount", str(disk)], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    return counts


def try_out(command: Command, sizes: int) -> dict[str, Any]:
    wanted, _ = uninterrupted(command)
    folder = Path(tempfile.mkdtemp(prefix="room-"))
    mount(folder, ROOM)
    try:
        run(command, folder, folder.with_name(folder.name + "-said"))
        used = ROOM - shutil.disk_usage(folder).free
    finally:
        subprocess.run(["umount", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    counts: Counter[str] = Counter()
    for k in range(sizes):
        counts += trial(command, wanted, int(used * (k + 0.5) / sizes), "full")
    for how in ("read-only", "read-only after"):
        counts += trial(command, wanted, used // 2, how)
    print(command.name, used, dict(counts), flush=True)
    return {"bytes": used, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, default=12)
    parser.add_argument("--only", default="scan,calibrate,circuit,fetch")
    parser.add_argument("--out", type=Path, help="write the counts to this JSON file")
    options = parser.parse_args()
    results = {c.name: try_out(c, options.sizes) for c in commands(set(options.only.split(",")))}
    about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine()}
    print(json.dumps({**about, "results": results}, indent=2))
    if options.out:
        options.out.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
    bad = ("wrong numbers", "traceback", "half a file under a final name", "something left over")
    wrong = sum(r.get(k, 0) for r in results.values() for k in bad)
    wrong += sum(r["runs"] - r.get("equal to the bit with room", 0) for r in results.values())
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
