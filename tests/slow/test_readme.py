"""Every command and every Python block of the README runs as printed; the example too. The tables
of docs/results.md hold the committed numbers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md",)
README = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
RESULTS = (ROOT / "docs/results.md").read_text(encoding="utf-8")
CARD = "interp show interp-scans/smollm2-135m --head L18H6"
BLOCKS = re.findall(r"```(bash|python|json)\n(.*?)```", README, re.DOTALL)


def run(arguments: list[str], cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.usefixtures("smollm2_folder")  # fetched once for the whole tier
def test_commands_run_as_printed(tmp_path: Path) -> None:
    lines = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("interp ")]
    assert len(commands) >= 2
    commands.remove(CARD)  # of the first command's scan: the test below
    for line in commands:
        done = run(["-m", "interp.cli.main", *shlex.split(line)[1:]], tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip(), line


def test_install_commands_are_the_ones_ci_runs() -> None:
    tests = next(block.strip() for kind, block in BLOCKS if kind == "bash" and "pytest" in block)
    assert tests in (ROOT / ".ci/run").read_text(encoding="utf-8")
    scan = next(block.strip() for kind, block in BLOCKS if kind == "bash" and "scan-heads" in block)
    assert scan.endswith(".venv/bin/interp scan-heads --model smollm2-135m --yes")


@pytest.mark.long
@pytest.mark.usefixtures("smollm2_folder")
def test_the_first_command_gives_what_is_printed(tmp_path: Path) -> None:
    """The same rows, with the same strongest heads."""
    arguments = ["-m", "interp.cli.main", "scan-heads", "--model", "smollm2-135m", "--yes"]
    done = run(arguments, tmp_path, timeout=1800)
    assert done.returncode == 0, done.stderr
    printed = next(b for b in re.findall(r"```text\n(.*?)```", README, re.DOTALL))
    for name, first in re.findall(r"^ (\w+) +(L\d+H\d+) ", printed, re.MULTILINE):
        assert re.search(rf"^ {name} +{first} ", done.stdout, re.MULTILINE), name
    assert "niah: asked in the format lead" in done.stdout
    card = run(["-m", "interp.cli.main", *shlex.split(CARD)[1:]], tmp_path)
    assert card.returncode == 0, card.stderr
    printed = re.findall(r"```text\n(.*?)```", README, re.DOTALL)[1]
    said = re.sub(r"\s+", " ", card.stdout)
    for part in printed.strip().split("\n\n"):
        assert re.sub(r"\s+", " ", part).strip() in said, part


@pytest.mark.parametrize("block", [b for kind, b in BLOCKS if kind == "python"])
def test_python_blocks_run(block: str, tmp_path: Path) -> None:
    done = run(["-c", block], tmp_path)
    assert done.returncode == 0, done.stderr


def test_quickstart_runs() -> None:
    done = run([str(ROOT / "examples/quickstart.py")], ROOT)
    assert done.returncode == 0, done.stderr
    assert "induction" in done.stdout


def test_cost_table_is_the_benchmark_file() -> None:
    """Every ratio in the cost table stands in the committed result."""
    result = json.loads((ROOT / "kernels/benchmarks/results/cpu.json").read_text(encoding="utf-8"))
    rows = {(r["model"], r["length"]): r for r in result["rows"]}
    table = re.findall(
        r"^\| (pocket-llama|random Llama, width 512) \| ([\d,]+) \|(.*)\|$", RESULTS, re.MULTILINE
    )
    assert len(table) >= 4
    for model, length, cells in table:
        ratios = rows[(model, int(length.replace(",", "")))]["ratios"]
        shown = [c.strip().rstrip("×").strip() for c in cells.split("|")]
        expected = [
            ratios.get(f"{way} / plain") for way in ("cheap", "full", "eager", "transformer_lens")
        ]
        assert shown[:4] == ["—" if e is None else f"{e:.2f}" for e in expected], (model, length)
    assert result["machine"] in RESULTS and result["date"] in RESULTS


def test_edit_table_is_the_committed_result() -> None:
    import edit_table

    result = json.loads((ROOT / "examples/edit_table.json").read_text(encoding="utf-8"))
    between = RESULTS.split(edit_table.BEGIN)[1].split(edit_table.END)[0].strip()
    assert between == edit_table.render(result)
    names = {row["edit"]["edit"] for row in result["edits"].values()}
    assert {"zero_tuning", "act", "scale_tokens", "move_mass", "scale_heads", "ablate"} <= names


def test_real_table_is_the_committed_result() -> None:
    import real_page

    result = json.loads((ROOT / "examples/real_table.json").read_text(encoding="utf-8"))
    between = RESULTS.split(real_page.BEGIN)[1].split(real_page.END)[0].strip()
    assert between == "\n".join(real_page.markdown(result)).strip()
    table = list(real_page.taken_out(result["cells"]))
    assert "\n".join(line for line in table if line.startswith("|")) in README


def test_vision_card_holds_the_measured_abilities() -> None:
    """And they reach what they are there for: the model does its tasks, and makes things up where
    it expects them."""
    folder = ROOT / "interp/models/pocket_llava"
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(
        f"| {name.partition(': ')[2]} | {value:.3f} |" in card
        for name, value in record["abilities"].items()
    )
    assert record["abilities"]["usual: questions right, random absent objects"] >= 0.95
    assert record["abilities"]["usual: object F1 of captions"] >= 0.9
    assert record["abilities"]["broken: told objects that are not there"] >= 0.1
    assert (folder / "model.safetensors").stat().st_size <= 24 * 2**20


def test_model_card_holds_the_measured_abilities() -> None:
    folder = ROOT / "interp/models/pocket_llama"
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    for task, value in record["abilities"].items():
        assert f"| {task} | {value:.3f} |" in card


def test_notebooks_hold_no_warnings_and_no_paths() -> None:
    files = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert len(files) >= 3
    for file in files:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        assert outputs and not [
            o for o in outputs if o.get("name") == "stderr" or o["output_type"] == "error"
        ], file
        assert "site-packages" not in json.dumps(outputs), file
