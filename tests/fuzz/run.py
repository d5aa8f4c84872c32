"""Runs the targets: counts what came out, keeps the inputs that gave a traceback."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from .target import Target
from .targets import SHARE, TARGETS

#: bytes that an input may ask for beyond what the process holds at the start
MEMORY = 8 * 2**30


class TooSlow(BaseException):
    """An input that ran past its limit. No `Exception`, so that nothing swallows it."""


@dataclass
class Report:
    """What came of a target's inputs: counts by outcome, faults by where they were raised."""

    target: str
    seed: int
    inputs: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "seed": self.seed,
            "inputs": self.inputs,
            "seconds": round(self.seconds, 1),
            "slowest": round(self.slowest, 2),
            "outcomes": dict(self.outcomes.most_common()),
            "tracebacks": sum(f["count"] for f in self.faults.values()),
            "faults": list(self.faults.values()),
        }


def run(name: str, inputs: int, number: int = 0) -> Report:
    """Runs so many inputs of a target, the same ones for the same seed."""
    report, before = Report(name, number), Path.cwd()
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    os.chdir(folder)
    start = time.monotonic()
    try:
        target = TARGETS[name](folder)

        @seed(number)
        @settings(
            max_examples=inputs,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(target.inputs())
        def each(value: Any) -> None:
            _one(target, value, report)

        with warnings.catch_warnings(), _limited_memory():
            warnings.simplefilter("ignore")
            each()
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)
        report.seconds = time.monotonic() - start
    return report


def _one(target: Target, value: Any, report: Report) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    report.inputs += 1
    start = time.monotonic()
    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, target.limit)  # of this process, however busy others are
    try:
        outcome = target.run(value)
    except TooSlow:
        outcome = "stopped: too slow"
        report.faults.setdefault(
            "slow", {"fault": "too slow", "count": 0, "inputs": [], "traceback": ""}
        )
        _keep(report.faults["slow"], value)
    except Exception as error:
        if target.refused(error):
            outcome = f"refused: {type(error).__name__}"
        else:
            outcome = f"TRACEBACK: {type(error).__name__}"
            _fault(report, value, error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    report.outcomes[outcome] += 1
    report.slowest = max(report.slowest, time.monotonic() - start)


def _fault(report: Report, value: Any, error: BaseException) -> None:
    """One entry a place in our code and type of error."""
    ours = [
        f"{Path(f.filename).name}:{f.lineno} {f.name}"
        for f in traceback.extract_tb(error.__traceback__)
        if "/interp" in f.filename and "/site-packages/" not in f.filename
    ]
    where = f"{type(error).__name__} at {ours[-1] if ours else 'the target'}"
    entry = report.faults.setdefault(
        where,
        {
            "fault": where,
            "count": 0,
            "inputs": [],
            "traceback": "".join(traceback.format_exception(error))[-3000:],
        },
    )
    _keep(entry, value)


def _keep(entry: dict[str, Any], value: Any) -> None:
    entry["count"] += 1
    if len(entry["inputs"]) < 3:
        try:
            entry["inputs"].append(repr(value)[:2000])
        except ValueError:
            entry["inputs"].append("an input with a number too long to print")


class _limited_memory:
    """A soft limit on the address space, so that an input that asks for all memory is a
    `MemoryError` and no dead machine."""

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)


def run_all(inputs: int, number: int, out: Path | None, only: list[str] | None = None) -> int:
    """Runs the targets, `inputs` in all or of each that is named; prints a line each, writes a JSON
    file each into `out`; how many inputs gave a traceback."""
    total = 0
    for name in only or TARGETS:
        many = inputs if only else max(1, inputs * SHARE[name] // 100)
        said = run(name, many, number).to_json()
        print(json.dumps({k: v for k, v in said.items() if k != "faults"}), flush=True)
        for entry in said["faults"]:
            print(f"  {entry['count']:>5} × {entry['fault']}", flush=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{name}.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        total += said["tracebacks"]
    return total
