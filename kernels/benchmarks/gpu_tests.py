"""A pytest plugin for `gpu.sh tests`: outcomes are saved as they come, and what passed is not run
again.

Runs the tests marked gpu and every test of the files named in `WHOLE`. A test that was running when
two runs were stopped counts as failed. The result is {gpu}_tests.json in $OUT, or in results/
beside this file. INTERP_TESTS_AGAIN=1 runs everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import record
import torch

#: Files whose tests are all run: those of the kernels, and of what the kernels are compared with.
WHOLE = ("test_fused*.py", "test_kernels.py", "test_steer*.py")
UNENDING = "failed: did not end in two runs"
_STATE: dict[str, Any] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Load what an earlier run found with the same sources, on the same machine."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sources = hashlib.sha256(record.digest(__file__).encode())
    for path in sorted((record.ROOT / "tests").rglob("*.py")):
        sources.update(path.read_bytes())
    head = dict(
        what="Tests of the kernels on a GPU.",
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        versions=record.versions(),
        sources=sources.hexdigest()[:12],
    )
    path, earlier = record.place("tests", device, None)
    _STATE.update(
        path=path, head=head, tests={}, saves=not hasattr(config, "workerinput")
    )  # xdist's workers do not
    for file in earlier:
        if file.is_file() and os.environ.get("INTERP_TESTS_AGAIN") != "1":
            old = json.loads(file.read_text(encoding="utf-8"))
            if all(old.get(key) == value for key, value in head.items()):
                stopped = {"started": "stopped", "started again": UNENDING}
                _STATE["tests"] = {
                    test: stopped.get(how, how) for test, how in old["tests"].items()
                }
            break


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what is for a GPU and has no outcome yet, or failed by itself."""
    keep, drop = [], []
    for item in items:
        ours = item.get_closest_marker("gpu") or any(
            fnmatch(Path(item.path).name, pattern) for pattern in WHOLE
        )
        known = _STATE["tests"].get(item.nodeid, "")
        done = known in ("passed", "skipped", UNENDING)
        (keep if ours and not done else drop).append(item)
    config.hook.pytest_deselected(items=drop)
    items[:] = keep


def _put(nodeid: str, outcome: str) -> None:
    tests = _STATE["tests"]
    if not _STATE["saves"]:
        return
    tests[nodeid] = outcome
    counts = {
        kind: sum(v.startswith(kind) for v in tests.values())
        for kind in ("passed", "failed", "skipped")
    }
    result = {
        **_STATE["head"],
        "date": time.strftime("%Y-%m-%d"),
        "revision": record.revision(),
        **counts,
    }
    path: Path = _STATE["path"]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(
        json.dumps({**result, "tests": tests}, indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    part.replace(path)


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _put(nodeid, "started again" if _STATE["tests"].get(nodeid) == "stopped" else "started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure in any phase counts; its last line is kept."""
    if report.failed:
        _put(report.nodeid, "failed: " + str(report.longrepr).strip().splitlines()[-1][:200])
    elif report.skipped:
        _put(report.nodeid, "skipped")
    elif report.when == "call" and _STATE["tests"].get(report.nodeid, "").startswith("started"):
        _put(report.nodeid, "passed")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing left to run is no error; what failed earlier still is one."""
    if _STATE["tests"] and session.exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        session.exitstatus = int(any(v.startswith("failed") for v in _STATE["tests"].values()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    outcomes = list(_STATE["tests"].values())
    counts = ", ".join(
        f"{sum(v.startswith(k) for v in outcomes)} {k}" for k in ("passed", "failed", "skipped")
    )
    terminalreporter.write_line(f"of all runs: {counts}: {_STATE['path']}")
