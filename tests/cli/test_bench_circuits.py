"""`interp bench-circuits`: methods, a stranger's among them, beside their shuffled twins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from interp.circuits import Bench, Truth
from interp.cli.main import app
from interp_hooks import Head

MINE = """
import numpy as np

def constant(model, prompts):
    return np.arange(model.n_layers * model.n_heads, dtype=float).reshape(model.n_layers, -1)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    Truth("mine", {Head(3, h): "x" for h in range(4)}, 4, 8, "made").save("truth.json")
    return tmp_path


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["bench-circuits", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


SMALL = ("--n", 6, "--truth-prompts", 12, "--draws", 1, "--device", "cpu")


def test_a_stranger_s_method_runs_in_the_same_bench() -> None:
    said = run("--method", "mine.py:constant", "--truth", "truth.json", "--out", "out", *SMALL)
    assert "Against mine, heads" in said and "labels †" in said
    assert "mine.py:constant" in said and "random_ranking" in said
    found = Bench.load("out")
    own = found.frame[found.frame.method == "mine.py:constant"]
    # heads 28 to 31 of a ranking by number: the strongest are in it, and nothing was read
    assert set(own.control) == {"labels", "pairs"} and (own.gain == 0).all()
    assert "holds a bench already" in run(
        "--method", "mine.py:constant", "--truth", "truth.json", "--out", "out", *SMALL, code=2
    )
    again = run("--truth", "truth.json", "--out", "out", "--overwrite", "--json", *SMALL)
    document = json.loads(again)
    assert {row["method"] for row in document["rows"]} >= {"attribution", "eap"}
    assert document["folder"] == "out" and document["truths"] == {"mine": "made"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "attributions"), "did you mean attribution"),
        (("--truth", "median"), "is neither"),
        (("--task", "ioii"), "did you mean ioi"),
        (("--method", "gone.py:fn"), "gone.py"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interp.cli.common.load", None)
    assert said in " ".join(run(*arguments, code=2).split())
