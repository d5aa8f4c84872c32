"""`--json`: every command that prints a table has it, and prints one JSON document and nothing
else on stdout."""

from __future__ import annotations

import ast
import json
from inspect import getsource
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

import interp
from interp.atlas import Atlas
from interp.cli.main import _COMMANDS, app
from interp.results.head_table import About

#: print a text that was asked for, or the one line of what was done: no table
NO_TABLE = {"generate", "get", "remove"}


def said(*arguments: Any, code: int = 0) -> Any:
    """The document on stdout."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, (result.output, result.exception)
    return json.loads(result.stdout)


def commands() -> dict[str, click.Command]:
    """Every command and subcommand, by name."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    found = dict(group.commands)  # type: ignore[attr-defined]
    return found | found["models"].commands  # type: ignore[attr-defined]


def test_every_command_that_prints_a_table_has_it() -> None:
    for name, command in commands().items():
        flags = {flag for p in command.params for flag in p.opts}
        assert ("--json" in flags) == (name not in NO_TABLE), name
        text = CliRunner().invoke(app, [*(["models"] if name in ("get", "remove") else []), name,
                                        "--help"]).output  # fmt: skip
        assert ("--json" in text) == (name not in NO_TABLE), name


def test_what_has_none_prints_no_table() -> None:
    for name in NO_TABLE & set(_COMMANDS):
        names = {
            n.id for n in ast.walk(ast.parse(getsource(_COMMANDS[name]))) if isinstance(n, ast.Name)
        }
        assert "table" not in names


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A saved scan of 2 × 2 heads, one value not measured."""
    frame = pd.DataFrame(
        dict(
            tower="", kind="self", layer=[0, 0, 1, 1], head=[0, 1, 0, 1], kv_head=0,
            sink=[0.1, 0.9, 0.4, np.nan], sink_stderr=[0.01, 0.02, np.nan, np.nan],
        )
    )  # fmt: skip
    about = {"sink": About("Attention sink", threshold=0.3)}
    return Atlas(frame, {"model": "täny"}, ["a note"], about).save(tmp_path / "scan")


def test_list() -> None:
    everything = said("list")
    assert {entry["kind"] for entry in everything} >= {"scores", "edits", "tasks"}
    scores = said("list", "scores")
    assert [entry["name"] for entry in scores] == interp.scores.names()
    assert all(entry["summary"] for entry in scores)


def test_show(scan: Path) -> None:
    whole = said("show", scan)
    assert whole["model"] == "täny" and whole["notes"] == ["a note"]
    (sink,) = whole["scores"]
    assert sink["above"] == 2 and sink["threshold"] == 0.3
    ranking = [
        {"head": "L0H1", "value": 0.9, "stderr": 0.02},
        {"head": "L1H0", "value": 0.4, "stderr": None},
        {"head": "L0H0", "value": 0.1, "stderr": 0.01},
    ]
    assert sink["top"] == ranking
    assert said("show", scan, "--score", "sink", "--top", 2) == ranking[:2]
    card = said("show", scan, "--head", "L0H1")
    assert card["head"] == "L0H1" and card["standings"][0]["value"] == 0.9


def test_compare(scan: Path) -> None:
    found = said("compare", scan, scan)
    assert found["models"] == ["täny", "täny"]
    assert found["scores"][0]["score"] == "sink" and found["scores"][0]["spearman"] == 1.0


def test_models_and_bench() -> None:
    found = said("models")
    assert [m["name"] for m in found["models"]] == [e.name for e in interp.models.catalog()]
    assert "cpu" in said("bench")


def test_an_error_leaves_stdout_empty(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["show", str(tmp_path / "none"), "--json"])
    assert result.exit_code == 2 and not result.stdout and "Error:" in result.stderr


@pytest.mark.slow
def test_runs_of_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scanned = said("scan-heads", "--scores", "sink", "--context", 64, "--samples", 2)
    assert scanned["model"] == "pocket-llama" and len(scanned["scores"][0]["top"]) == 10
    assert Path(scanned["folder"]).is_dir() and Path(scanned["report"]).is_file()
    found = said("evaluate", "--task", "induction", "--n", 4, "--out", "evaluated")
    assert found["baseline"]["n"] == 4 and found["edited"] is None
    again = said("show", "evaluated")
    assert again["baseline"] == found["baseline"] and again["task"] == "induction"
    gone = said("ablate", "--heads", "L2H3", "--task", "induction", "--n", 4)
    assert gone["heads"] == ["L2H3"] and set(gone["difference"]) == {"mean", "low", "high", "n"}
    circuit = said("circuit", "--method", "head_ablation", "--n", 4, "--top", 3)
    assert len(circuit["heads"]) == 3 and circuit["search"]["task"] == "ioi"
    first = circuit["heads"][0]
    assert set(first) >= {"head", "score", "low", "high", "effect", "effect_low", "effect_high"}
    assert first["effect_low"] <= first["effect"] <= first["effect_high"]
    tuned = said("calibrate", "--method", "zerotuning", "--n", 8, "--out", "tuned.json")
    assert tuned["edits"] == json.loads(Path("tuned.json").read_text())
    assert set(tuned["heldout"]["accuracy"]) == {"baseline", "edited", "difference"}


@pytest.mark.slow
def test_check_prints_records() -> None:
    outcomes = said("check", "llama")
    assert outcomes and {"mode", "check", "status"} <= set(outcomes[0])
