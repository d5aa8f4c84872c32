"""kernels/benchmarks/host_time.py runs, alone and against a checkout, and its result is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "kernels/benchmarks"

pytestmark = pytest.mark.skipif(
    not BENCHMARKS.is_dir(), reason="the benchmarks are not part of the wheel"
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "_fused"])
def test_every_case_is_timed_and_compared(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "host_time.json"
    command = [sys.executable, str(BENCHMARKS / "host_time.py"), "--quick", "--rounds", "2"]
    if kind:
        pytest.importorskip("triton")
        command.append("--fused")
    done = subprocess.run(
        [*command, "--against", str(ROOT), "--out", str(out)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    kept = json.loads((BENCHMARKS / f"results/host_time{kind}.json").read_text())["rows"]
    assert [(row["name"], row["keys"]) for row in rows] == [
        (row["name"], row["keys"]) for row in kept
    ]
    for row in rows:
        assert row["us"] > 0 and row["against_us"] > 0
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]


def test_half_of_what_it_was() -> None:
    """The committed figures: a plain call, and statistics over a cache of 128 keys."""
    kept = json.loads((BENCHMARKS / "results/host_time.json").read_text())["rows"]
    ratios = {(row["name"], row["keys"]): row["ratio"] for row in kept}
    assert ratios["plain", 16] <= 0.5
    assert ratios["entropy, max, argmax", 128] <= 0.5


def test_a_planned_step_takes_60_microseconds() -> None:
    """The committed figures of the kernels' decode step, without its launches: plain, edited, with
    the strongest keys, with statistics."""
    kept = json.loads((BENCHMARKS / "results/host_time_fused.json").read_text())["rows"]
    took = {row["name"]: row["us"] for row in kept}
    for name in (
        "plain", "gain", "edit with a rule", "strongest 8 keys", "entropy, max, argmax",
        "edit and statistics",
    ):  # fmt: skip
        assert took[f"fused, {name}"] <= 60
