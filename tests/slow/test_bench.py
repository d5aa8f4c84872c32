"""The benchmarks run here in small, resume, and their committed results are what `interp bench`
shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from interp.cli.main import app

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "kernels/benchmarks"
SCRIPTS = {"h200_kernels.json": "kernel_times.py", "h200_model.json": "longcontext.py"}
FIGURES = {"ms", "ratio", "met", "spread", "floor_ms"}

pytestmark = pytest.mark.skipif(
    not BENCHMARKS.is_dir(), reason="the benchmarks are not part of the wheel"
)


def script(name: str, *arguments: str, timeout: int = 240) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8"))["rows"]


def test_every_kernel_row_can_be_measured_and_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    script("kernel_times.py", "--smoke", "--out", str(out))
    first = rows(out)
    assert len(first) > 30
    for row in first:
        if row["name"] == "FlexAttention with lse and max_scores" and row["measured"] == "skipped":
            continue  # not on CPUs
        assert "error" not in row and row["ms"] > 0, row
        assert row["error_share"] <= 1
        assert (row["of"] == "") == ("ratio" not in row)
        assert row["bar"] is None or row["met"] in ("goal", "bar", "missed")
    script("kernel_times.py", "--smoke", "--out", str(out))
    assert rows(out) == first  # times would differ had anything run again

    result = json.loads(out.read_text(encoding="utf-8"))
    again = next(row for row in result["rows"] if row["name"] == "decode")
    again["sources"] = "others"
    out.write_text(json.dumps(result), encoding="utf-8")
    printed = script("kernel_times.py", "--smoke", "--out", str(out))
    assert len([line for line in printed.splitlines() if " ms " in line]) == 1

    script("kernel_times.py", "--smoke", "--tune", "--out", str(out))
    tuning = json.loads(out.read_text(encoding="utf-8"))["tuning"]
    assert len(tuning) == 4
    for name, entry in tuning.items():
        assert entry["best"] is not None, (name, entry)
    assert len(rows(out)) == len(first)


def test_every_model_row_can_be_measured_and_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "model.json"
    script("longcontext.py", "--smoke", "--out", str(out))
    first = rows(out)
    for row in first:
        if row["name"].startswith("extra peak memory"):
            assert (
                row["measured"] == "skipped" or row["ratio"] >= 0
            )  # a CPU has no counter of its peak
        else:
            assert "error" not in row and row["ms"] > 0, row
    script("longcontext.py", "--smoke", "--out", str(out))
    assert rows(out) == first


@pytest.mark.parametrize("file", SCRIPTS)
def test_committed_results_follow_the_plan(file: str) -> None:
    """Unmeasured, the file is what --plan prints; measured, it has the plan's rows, and figures
    only where measured."""
    committed = json.loads((BENCHMARKS / "results" / file).read_text(encoding="utf-8"))
    plan = json.loads(script(SCRIPTS[file], "--plan"))
    if committed["date"] == "not measured":
        assert committed == plan
    fixed = ("name", "length", "of", "bar", "goal")
    planned = {tuple(row[key] for key in fixed) for row in plan["rows"]}
    assert {tuple(row[key] for key in fixed) for row in committed["rows"]} == planned
    for row in committed["rows"]:
        if row["measured"] in ("not measured", "failed", "skipped"):
            assert not FIGURES & set(row), row


def test_the_issue_s_bars_are_planned() -> None:
    found = [
        row
        for file in SCRIPTS
        for row in rows(BENCHMARKS / "results" / file)
        if row["bar"] is not None
    ]
    assert {(row["bar"], row["goal"]) for row in found} == {
        (1.45, 1.15),
        (1.67, 1.25),
        (0.8, 0.6),
        (1.1, 1.03),
        (1.15, 1.05),
        (3.8, 2.6),
        (2.2, 1.5),
        (0.6, 0.85),
        (0.05, 0.01),
        (3.0, 1.8),
    }


def test_bench_prints_every_row_that_has_a_bar() -> None:
    shown = CliRunner().invoke(app, ["bench"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    for file in SCRIPTS:
        for row in rows(BENCHMARKS / "results" / file):
            if row["bar"] is not None:
                lines = [
                    line
                    for line in shown.output.splitlines()
                    if line.strip().startswith(row["name"] + "  ")
                ]
                assert lines, row
                if row["measured"] == "not measured":
                    assert any("not measured" in line for line in lines)
    assert "pocket-llama" in shown.output and "1.35" in shown.output


def test_bench_shows_figures_of_other_results(tmp_path: Path) -> None:
    row = dict(
        name="plain forward", length=32768, of="cuDNN", bar=1.45, goal=1.15, measured="2026-01-01"
    )
    missed = dict(
        row,
        name="decode with edit",
        of="bandwidth",
        bar=0.6,
        goal=0.85,
        ms=1.0,
        ratio=0.4,
        met="missed",
    )
    failed = dict(
        row, name="slow", bar=None, goal=None, measured="failed", error="OutOfMemoryError: 3 GB"
    )
    measured = dict(row, ms=14.5, floor_ms=11.16, ratio=1.21, met="bar", spread=0.01)
    result = dict(
        gpu="GPU", date="2026-01-01", versions={"torch": "2"}, rows=[measured, missed, failed]
    )
    (tmp_path / "gpu_kernels.json").write_text(json.dumps(result), encoding="utf-8")
    shown = CliRunner().invoke(app, ["bench", "--results", str(tmp_path)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    lines = {line.split("  ")[0].strip(): line for line in shown.output.splitlines()}
    assert all(
        part in lines["plain forward"]
        for part in ("14.500", "11.160", "1.21", "≤ 1.45", "≤ 1.15", "bar")
    )
    assert "≥ 0.60" in lines["decode with edit"] and lines["decode with edit"].rstrip().endswith(
        "no"
    )
    assert "OutOfMemoryError" in lines["slow"]


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"rows": [{}], "gpu": "x", "date": "", "versions": {}}']
)
def test_bench_explains_bad_results(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x_kernels.json").write_text(content, encoding="utf-8")
    shown = CliRunner().invoke(app, ["bench", "--results", str(tmp_path)])
    assert shown.exit_code == 2 and "Traceback" not in shown.output
    assert str(tmp_path) in shown.output.replace("\n", "")


def test_bench_loads_no_torch() -> None:
    code = (
        "import sys; from interp.cli.main import app\n"
        "try: app(['bench'])\n"
        "except SystemExit as done: print('CODE', done.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "CODE 0 False" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize("what", ["tests", "kernels", "model", "other"])
def test_gpu_script_says_what_it_lacks(what: str, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(BENCHMARKS / "gpu.sh")], check=True)
    if torch.cuda.is_available() and what != "other":
        pytest.skip("it would run")
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert ("Usage" if what == "other" else "no CUDA device") in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
@pytest.mark.parametrize("name", SCRIPTS.values())
def test_scripts_say_that_there_is_no_gpu(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.startswith("No CUDA device")


def test_every_edit_can_be_timed_and_shown(tmp_path: Path) -> None:
    script(
        "edits.py",
        "--length",
        "128",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "cpu_edits.json"),
    )
    for row in rows(tmp_path / "cpu_edits.json"):
        names = [edit["edit"] for edit in row["edits"]]
        assert {"zero_tuning", "scale_tokens", "scale_heads", "act"} <= set(names)
        assert 0 < row["attention_share"] < 1 and all(
            edit["seconds"] > 0 and edit["route"] for edit in row["edits"]
        )
        assert all(
            (edit["ratio"] <= edit["bar"]) == edit["met"]
            for edit in row["edits"]
            if edit["bar"] is not None
        )
    shown = (
        CliRunner()
        .invoke(app, ["bench", "--results", str(tmp_path)], env={"COLUMNS": "120"})
        .output
    )
    assert "Edits, whole model" in shown and "zero_tuning" in shown and "≤ 2.50" in shown
