"""The first ten minutes on a GPU: the command and its check, as far as a CPU can run them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"
sys.path.append(str(FOLDER))


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_what_fails_is_stepped_over(tmp_path: Path) -> None:
    """With a Python that says there is a device: all steps run, the check's failure is the exit
    code, and a step that lost its device is run again."""
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(
        "#!/bin/bash\n"
        f'echo "$*" >> {log}\n'
        'case "$1" in\n'
        "  -c) exit 0 ;;\n"
        "  *first_smoke.py) exit 1 ;;\n"
        f"  *longcontext.py) [ $(grep -c longcontext {log}) = 1 ] && exit 3; exit 1 ;;\n"
        "esac\n"
    )
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    env = os.environ | {"PYTHON": str(stub), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", str(FOLDER / "gpu.sh"), "first"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    ran = [line.split()[0].rsplit("/")[-1] for line in log.read_text().splitlines()]
    assert [name for name in ran if name.endswith(".py")] == [
        "first_smoke.py",
        "longcontext.py",
        "longcontext.py",
        "kernel_times.py",
        "kernel_times.py",
    ]
    assert "131072" in log.read_text()
    assert "32768" in log.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's share")
def test_the_check_finds_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import first_smoke

    names = ["decode, D = 64", "one CUDA graph"]
    first_smoke.work(names, tmp_path / "rows.jsonl", "here", torch.device("cpu"))
    assert first_smoke.done_before(tmp_path / "rows.jsonl", "here") == set(names)
    assert not first_smoke.done_before(tmp_path / "rows.jsonl", "elsewhere")
    real = first_smoke.attention

    def spoilt(*tensors: torch.Tensor, **settings: object) -> object:
        result = real(*tensors, **settings)
        if settings["backend"] == "triton":
            result.out[..., 0, 0] += 0.3
        return result

    monkeypatch.setattr(first_smoke, "attention", spoilt)
    first_smoke.work(names[:1], tmp_path / "rows.jsonl", "spoilt", torch.device("cpu"))
    last = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[-1])
    assert not last["ok"]
    assert "out: off by" in last["error"]


def test_every_kernel_is_in_the_check() -> None:
    import first_smoke

    names = set(first_smoke.cases())
    for words in (
        "static",
        "graph",
        "generation",
        "spans",
        "scattered",
        "window",
        "D = 96",
        "D = 512",
        "after a rule",
        "top-k of every row",
        "dense mask",
        "kept keys",
    ):
        assert any(words in name for name in names), words
    assert len(names) >= 40
