"""`interp compress` on pocket-llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from interp.cli.main import app

SMALL = ["--context", "128", "--recent", "12", "--n", "2", "--samples", "2"]


def test_it_prints_a_table_and_writes_the_gates(tmp_path: Path) -> None:
    target = tmp_path / "half"
    done = CliRunner().invoke(
        app, ["compress", "--model", "llama", *SMALL, "--out", str(target)], env={"COLUMNS": "120"}
    )
    assert done.exit_code == 0, done.output
    for word in ("whole", "by retrieval", "3 random draws", "streaming in all", "kv heads keep"):
        assert word in done.output
    assert (target / "full_attention_heads.tsv").is_file() and (target / "gate.json").is_file()
    said = CliRunner().invoke(
        app,
        [
            "generate",
            "--model",
            "llama",
            "--edit",
            str(target / "gate.json"),
            "--prompt",
            "the cat",
        ],
    )
    assert said.exit_code == 0, said.output


@pytest.mark.parametrize(
    "options,sentence",
    [
        (["--budget", "1.5"], "between 0 and 1"),
        (["--budget", "0.01"], "take a longer context"),
        (["--score", "nonsense"], "nonsense"),
    ],
)
def test_what_can_not_be_is_one_sentence(options: list[str], sentence: str) -> None:
    done = CliRunner().invoke(app, ["compress", "--model", "llama", *SMALL, *options])
    assert done.exit_code == 2 and sentence in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_json() -> None:
    done = CliRunner().invoke(app, ["compress", "--model", "llama", *SMALL, "--json"])
    rows = json.loads(done.stdout)
    assert [row["cache"] for row in rows][:2] == ["whole", "by retrieval"]
    assert rows[0]["memory"] == 1
