"""Calibrations on disk and on the command line: saving, loading, resuming, what is refused, what is
shown."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_calibration import NEEDLE, SHORT, Interrupted
from typer.testing import CliRunner, Result

import interp
from interp import calibration, tasks
from interp.calibration.calibration import Calibration
from interp.calibration.gates import GateTraining
from interp.calibration.splits import LEAST, split
from interp.cli.main import app
from interp.errors import InputError, OutputError
from interp_hooks import HookedModel


@pytest.fixture(scope="module")
def small(worded: Callable[[str], Any]) -> HookedModel:
    return worded("llama")[0]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- saving and loading
# ---------------------------------------------------------------------------------------


def test_a_calibration_comes_back_as_it_was_saved(small: HookedModel, tmp_path: Path) -> None:
    for method, out in (
        (GateTraining(steps=1, sink=2, recent=8), "gates.json"),
        ("zerotuning", "zero"),
    ):
        made = interp.calibrate(small, method, NEEDLE, n=8, force=True, out=tmp_path / out)
        found = interp.Calibration.load(tmp_path / out)
        assert (found.trace is None) == (made.trace is None) and found.trials.equals(made.trials)
        assert made.trace is None or made.trace.equals(found.trace)
        for name in ("method", "task", "edits", "train", "heldout", "notes", "provenance"):
            assert getattr(found, name) == getattr(made, name), name
    assert interp.Calibration is Calibration and interp.Evaluation.__name__ == "Evaluation"


def test_tables_of_an_earlier_result_go(small: HookedModel, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    interp.calibrate(
        small, GateTraining(steps=1, sink=2, recent=8), NEEDLE, n=8, force=True, out=out
    )
    assert names(tmp_path) == [
        "x.calibration.json",
        "x.json",
        "x.trace.parquet",
        "x.trials.parquet",
    ]
    other: dict[str, Any] = dict(n=8, grid=(2.0,), profile=False, out=out)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(OutputError, match=r"of another run .*code.*--overwrite"):
        interp.calibrate(small, "zerotuning", SHORT, progress=Interrupted(0), **other)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    interp.calibrate(small, "zerotuning", SHORT, overwrite=True, **other)
    assert names(tmp_path) == ["x.calibration.json", "x.json", "x.trials.parquet"]
    interp.calibrate(small, "zerotuning", SHORT, **other)  # the same again is no other
    (tmp_path / "mine.json").write_text("[]")
    with pytest.raises(OutputError, match="no calibration made it"):
        interp.calibrate(small, "zerotuning", SHORT, **{**other, "out": tmp_path / "mine.json"})
    assert Calibration.load(out).trace is None


def test_damaged_calibrations_are_refused(small: HookedModel, tmp_path: Path) -> None:
    out, head = tmp_path / "x.json", tmp_path / "x.calibration.json"
    with pytest.raises(OutputError, match="can't be read: no such file"):
        Calibration.load(out)
    interp.calibrate(small, "zerotuning", SHORT, n=8, grid=(2.0,), profile=False, out=out)
    whole = head.read_text(encoding="utf-8")
    for content, says in (
        ("{", "is damaged"),
        ("[]", "of format 1"),
        (whole.replace('"format": 1', '"format": 2'), "of format 1"),
        (whole.replace('"heldout"', '"held"'), "is damaged"),
        (whole.replace('"high"', '"hi"'), "is damaged"),
    ):
        head.write_text(content, encoding="utf-8")
        with pytest.raises(OutputError, match=says):
            Calibration.load(out)
    head.write_text(whole, encoding="utf-8")
    for name in ("x.json", "x.trials.parquet"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(kept[:-20])
        with pytest.raises(OutputError, match="is not the one"):
            Calibration.load(out)
        (tmp_path / name).unlink()
        with pytest.raises(OutputError, match="can't be read"):
            Calibration.load(out)
        (tmp_path / name).write_bytes(kept)
    assert Calibration.load(out).method == "zerotuning"


# --- refused before anything runs
# -----------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_runs(
    small: HookedModel, tmp_path: Path
) -> None:
    """Nothing runs, nothing is left, and pieces of an interrupted run stay where they are."""
    out = tmp_path / "x.json"
    refused: list[tuple[str, str, dict[str, Any]]] = [
        *(("layer 9", name, dict(layers=[9])) for name in ("act", "zerotuning", "headhunter")),
        ("sees all", "gates", dict(recent=5000)),
    ]

    def refuse() -> None:
        for words, method, settings in refused:
            with pytest.raises(InputError, match=words):
                interp.calibrate(
                    small, method, SHORT, n=8, out=out, progress=Interrupted(0), **settings
                )

    refuse()
    assert not names(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interp.calibrate(small, "zerotuning", SHORT, n=8, out=out, progress=Interrupted(5))
    pieces = names(tmp_path / "x.resume" / "partial")
    refuse()
    assert len(pieces) > 1 and names(tmp_path / "x.resume" / "partial") == pieces


def test_an_interrupted_calibration_goes_on_where_it_was(
    small: HookedModel, tmp_path: Path
) -> None:
    settings: dict[str, Any] = dict(n=8, grid=(0.5, 2.0), seed=3, force=True)
    whole = interp.calibrate(small, "zerotuning", SHORT, **settings)
    out = tmp_path / "edit.json"
    with pytest.raises(KeyboardInterrupt):
        interp.calibrate(small, "zerotuning", SHORT, out=out, progress=Interrupted(7), **settings)
    assert small.observers_and_edits() == ([], []) and not out.exists()
    pieces = {
        p.name: p.stat().st_mtime_ns
        for p in (tmp_path / "edit.resume" / "partial").glob("*.parquet")
    }
    assert pieces
    with pytest.raises(KeyboardInterrupt):
        interp.calibrate(small, "zerotuning", SHORT, out=out, progress=Interrupted(10), **settings)
    later = {
        p.name: p.stat().st_mtime_ns
        for p in (tmp_path / "edit.resume" / "partial").glob("*.parquet")
    }
    assert len(later) > len(pieces) and pieces.items() <= later.items()  # nothing was done twice
    resumed = interp.calibrate(small, "zerotuning", SHORT, out=out, **settings)
    assert (
        resumed.trials.equals(whole.trials)
        and resumed.edits == whole.edits
        and resumed.heldout == whole.heldout
    )
    assert out.is_file() and not (tmp_path / "edit.resume").exists()


def test_a_calibration_killed_while_it_saves_goes_on(
    small: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edits are there, their record is not: they are its own, and no others."""
    how: dict[str, Any] = dict(n=8, grid=(2.0,), profile=False, out=tmp_path / "x.json")

    def killed(self: Calibration, path: Path) -> None:
        from interp import edits

        edits.save(path, self.edits)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Calibration, "save", killed)
        interp.calibrate(small, "zerotuning", SHORT, **how)
    assert names(tmp_path) == ["x.json", "x.resume"]
    interp.calibrate(small, "zerotuning", SHORT, **how)
    assert names(tmp_path) == ["x.calibration.json", "x.json", "x.trials.parquet"]


def test_pieces_of_another_calibration_are_not_used(small: HookedModel, tmp_path: Path) -> None:
    out = tmp_path / "edit.json"
    with pytest.raises(KeyboardInterrupt):
        interp.calibrate(
            small, "zerotuning", SHORT, n=8, out=out, progress=Interrupted(7), grid=(2.0,)
        )
    other = interp.calibrate(
        small, "zerotuning", SHORT, n=8, seed=3, force=True, out=out, grid=(2.0,)
    )
    assert other.trials.equals(
        interp.calibrate(small, "zerotuning", SHORT, n=8, seed=3, force=True, grid=(2.0,)).trials
    )


@pytest.mark.parametrize("damage", [b"", b"PAR1", None], ids=["empty", "short", "truncated"])
def test_a_damaged_piece_is_measured_again(
    small: HookedModel, tmp_path: Path, damage: bytes | None
) -> None:
    settings: dict[str, Any] = dict(n=8, grid=(0.5, 2.0), profile=False)
    whole = interp.calibrate(small, "zerotuning", SHORT, **settings)
    with pytest.raises(KeyboardInterrupt):
        interp.calibrate(
            small, "zerotuning", SHORT, out=tmp_path / "x.json", progress=Interrupted(4), **settings
        )
    pieces = list((tmp_path / "x.resume" / "partial").glob("*.parquet"))
    assert pieces
    for piece in pieces:
        content = piece.read_bytes()
        piece.write_bytes(content[: len(content) // 2] if damage is None else damage)
    found = interp.calibrate(small, "zerotuning", SHORT, out=tmp_path / "x.json", **settings)
    assert found.trials.equals(whole.trials) and found.heldout == whole.heldout


# --- the command line
# -----------------------------------------------------------------------------------------


def run(*words: object, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["calibrate", *map(str, words)], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done


def test_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "my gain.json"
    words = ["--task", "colored_objects", "--n", LEAST, "--out", out]
    shown = run("--method", "headhunter", "--layers", "3", "--rounds", "1", *words).output
    assert "held out, accuracy" in shown and "training, margin" in shown and out.is_file()
    assert "nothing to edit" in shown and "interp evaluate" not in shown
    again = ["--method", "zerotuning", "--layers", "0"]
    assert "there already and is of another run" in run(*again, *words, code=2).output
    shown = run(
        "--overwrite",
        "--method",
        "zerotuning",
        "--unsupervised",
        "--layers",
        "0",
        "--model",
        "pocket-llama",
        *words,
    ).output
    assert "held out, entropy" in shown and "margin" not in shown
    (line,) = (line for line in shown.splitlines() if "interp evaluate" in line)
    command = shlex.split(line[line.index("interp evaluate") :])
    expected = [
        "--model",
        "pocket-llama",
        "--task",
        "colored_objects",
        "--edit",
        str(out),
        "--n",
        str(LEAST),
    ]
    assert command == ["interp", "evaluate", *expected, "--seed", "1"]
    done = CliRunner().invoke(app, command[1:])
    assert done.exit_code == 0 and "edited" in done.output, done.output
    for wrong, sentence in (
        (["--method", "actt"], "did you mean act"),
        (
            ["--method", "act", "--unsupervised"],
            "--unsupervised is not an option of the method act; it takes --layers",
        ),
        (["--method", "gates", "--layers", "1"], "it takes --steps, --sparsity, --sink, --recent."),
        (["--method", "act", "--layers", "1-x"], "--layers takes"),
        (["--method", "act", "--n", LEAST - 1], "'--n'"),
        (["--method", "act", "--seed", "-1"], "'--seed'"),
    ):
        assert sentence in " ".join(run(*words, *wrong, code=2).output.split())


def test_the_next_seed_has_other_instances(small: HookedModel) -> None:
    """What the printed command measures on is in neither split."""
    parts = split(small, "classification", 32, None, 0)
    known = {i.prompt for i in (*parts.train, *parts.heldout)}
    assert known.isdisjoint(
        i.prompt for i in tasks.get("classification").sample(small.tokenizer, 32, 1)
    )


def test_help_says_what_the_methods_do() -> None:
    shown = " ".join(run("--help").output.replace("│", " ").split())
    for name in calibration.names():
        summary = calibration.registry.summary(name)  # read from the source, without torch
        assert summary == calibration.registry.get(name).summary
        assert f"{name}: {summary}." in shown
    assert f"x>={LEAST}" in shown
