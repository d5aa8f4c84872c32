"""What an optional extra brings: said in one sentence where it is missing, and not needed by the
rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from interp import circuits
from interp.cli.main import app
from interp.errors import InterpError, MissingExtraError
from interp.support.extras import need

SENTENCE = "Discrete-SAE circuits need sae-lens; install it with: pip install 'interp[sae]'."
#: what only extras bring, with packages that those were once relied on for
ABSENT = (
    *("sae_lens", "transformer_lens", "lm_eval", "datasets", "evaluate", "ray", "diffusers"),
    *("einops", "jaxtyping", "beartype", "wandb", "matplotlib", "sklearn", "nltk"),
)


def test_what_is_installed_is_not_missed() -> None:
    need("numpy", extra="sae", what="Sums")


def test_what_is_missing_is_named_with_the_command() -> None:
    with pytest.raises(MissingExtraError) as raised:
        need("no_such_package", extra="thing", what="Wonders")
    expected = "Wonders need no-such-package; install it with: pip install 'interp[thing]'."
    assert str(raised.value) == expected
    assert isinstance(raised.value, InterpError) and isinstance(raised.value, ImportError)


def test_discrete_sae_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(MissingExtraError) as raised:
        circuits.find("llama", "ioi", "discrete_sae", n=8)
    assert str(raised.value) == SENTENCE
    assert "discrete_sae" in circuits.names()


def test_the_command_line_says_it_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    done = CliRunner().invoke(app, "circuit --task ioi --method discrete_sae --n 8".split())
    assert done.exit_code == 2
    assert SENTENCE in " ".join(done.output.split()) and "Traceback" not in done.output


@pytest.mark.slow
def test_the_base_install_scans_finds_a_circuit_and_reports(tmp_path: Path) -> None:
    script = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
import interp
from interp import circuits
for package in (interp, circuits, interp.edits, interp.mechanics, interp.vision):
    for name in package.__all__:
        getattr(package, name)
model = interp.load("llama")
interp.scan_heads(model, "sink", 32, 1, progress=False).report("scan.html")
circuits.find(model, "ioi", "attribution", n=8).report("circuit.html")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "scan.html").is_file() and (tmp_path / "circuit.html").is_file()


def test_serve_check_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No extra can bring it, so the sentence names the page with the commands."""
    edit = tmp_path / "edit.json"
    edit.write_text('[{"edit": "scale_heads", "gains": {"L2H3": 0.0}}]', encoding="utf-8")
    monkeypatch.setitem(sys.modules, "vllm", None)
    done = CliRunner().invoke(app, ["serve-check", "llama", "--edit", str(edit)])
    assert done.exit_code == 2
    assert (
        "serve-an-edit.md" in "".join(done.output.split("│")).replace("\n", "")
        and "Traceback" not in done.output
    )
