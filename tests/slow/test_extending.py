"""docs/extending.md: each kind of extension, added from another package and as one file and one
line in a copy of this one; seen in `interp list`, in the help of a command and in a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve()
ROOT = next(p for p in ROOT.parents if (p / "docs" / "extending.md").is_file())
GUIDE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`(\w+)\.py`:\n\n```python\n(.*?)```", GUIDE, flags=re.S))


@dataclass(frozen=True)
class Kind:
    """One kind of extension in the guide."""

    kind: str
    file: str
    attribute: str
    room: str
    #: the list to which one line is added, and the line before which it goes
    list: str
    command: str
    run: str

    @property
    def line(self) -> str:
        if self.list.endswith(".pyi"):
            return f"from .{self.file} import {self.attribute} as {self.attribute}"
        return (
            f'"{self.file}": "interp.{self.room.replace("/", ".")}.{self.file}:{self.attribute}",'
        )


SCAN = (
    "import interp; m = interp.load('llama')\n"
    "a = interp.scan_heads(m, scores='{score}', context=64, samples=2, progress=False)\n"
    "out = float(a['{score}'].mean())\n"
)
KINDS = (
    Kind("scores", "far", "Far", "scores", "catalogue.py", "scan-heads", SCAN.format(score="far")),
    Kind(
        "probes",
        "backwards",
        "Backwards",
        "probes",
        "catalogue.py",
        "list",
        "import interp\n"
        "from interp.scores.entropy import Entropy\n"
        "class Shy(Entropy):\n"
        "    name, probe = 'shy', 'backwards'\n"
        "interp.scores.registry.add('shy', Shy())\n" + SCAN.format(score="shy"),
    ),
    Kind(
        "tasks",
        "meeting",
        "Meeting",
        "tasks",
        "catalogue.py",
        "evaluate",
        "import interp\nout = interp.evaluate('llama', task='meeting', n=4).baseline.mean",
    ),
    Kind(
        "edits",
        "flip",
        "Flip",
        "edits",
        "__init__.pyi",
        "generate",
        "import interp, torch; m = interp.load('llama'); ids = torch.tensor([[1, 2, 3]])\n"
        "edit, = interp.edits.from_json([{'edit': 'flip', 'heads': ['L1H2']}])\n"
        "with torch.no_grad(), m.edit(edit): one = m.logits(ids)\n"
        "with torch.no_grad(), m.edit(interp.edits.ScaleHeads({'L1H2': -1.0})):\n"
        "    other = m.logits(ids)\n"
        "assert torch.equal(one, other)\nout = float(one.mean())",
    ),
    Kind(
        "procedures",
        "twice",
        "Twice",
        "procedures",
        "__init__.pyi",
        "list",
        "import interp\n"
        "made = interp.procedures.get('twice')().generate('llama', 'Mary met John .', 3)\n"
        "out = float(len(made))",
    ),
    Kind(
        "circuits",
        "norm_change",
        "NormChange",
        "circuits/methods",
        "catalogue.py",
        "circuit",
        "import interp\n"
        "c = interp.circuits.find('llama', 'ioi', 'norm_change', n=4)\n"
        "out = float(c.frame.norm_change.max()); assert out > 0",
    ),
    Kind(
        "calibration",
        "best_scale",
        "BestScale",
        "calibration",
        "catalogue.py",
        "calibrate",
        "import interp\n"
        "c = interp.calibrate('llama', 'best_scale', n=8, heads=1, gains=(0.0,))\n"
        "out = float(len(c.trials)); assert out == 1",
    ),
)


def python(code: str, paths: list[Path]) -> str:
    """The last line that a fresh interpreter prints; fails with what it says on stderr."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "COLUMNS": "400",
    }
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=env,
        cwd=paths[0],
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


CHECK = """
import contextlib, io, json, sys
from interp.cli.main import app
def shown(*words):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try: app(list(words), standalone_mode=False)
        except SystemExit: pass
    return text.getvalue()
help_text, listing = shown({command!r}, "--help"), shown("list", {kind!r})
import importlib
names = importlib.import_module("interp." + {kind!r}).names()
{run}
print(json.dumps(dict(help={file!r} in help_text, listed={file!r} in listing,
                      named={file!r} in names, out=out)))
"""


def check(kind: Kind, paths: list[Path]) -> None:
    code = CHECK.format(command=kind.command, kind=kind.kind, file=kind.file, run=kind.run)
    found = json.loads(python(code, paths).strip().splitlines()[-1])
    assert found["help"] and found["listed"] and found["named"], found
    assert isinstance(found["out"], float)


def test_the_guide_has_a_file_for_each_kind() -> None:
    assert set(FILES) == {kind.file for kind in KINDS}
    for kind in KINDS:
        assert kind.line in GUIDE, kind.line


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_from_a_package_of_ones_own(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(FILES[kind.file], encoding="utf-8")
    about = tmp_path / "elsewhere-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        f"[interp.{kind.kind}]\n{kind.file} = elsewhere:{kind.attribute}\n"
    )
    check(kind, [tmp_path])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_as_one_file_and_one_line(kind: Kind, tmp_path: Path) -> None:
    copy = tmp_path / "interp"
    shutil.copytree(ROOT / "interp", copy, ignore=shutil.ignore_patterns("__pycache__"))
    room = copy / kind.room
    (room / f"{kind.file}.py").write_text(FILES[kind.file], encoding="utf-8")
    listed = room / kind.list
    lines = listed.read_text(encoding="utf-8").split("\n")
    if kind.list.endswith(".pyi"):
        at = 0
    else:
        at = next(i for i, line in enumerate(lines) if re.match(r'\s+"\w+": "interp\.', line))
    lines.insert(at, kind.line)
    listed.write_text("\n".join(lines), encoding="utf-8")
    check(kind, [tmp_path])


def test_the_edit_that_binds_works_on_two_models() -> None:
    """The guide's second edit: each head's output has its mean norm afterwards."""
    import torch

    import interp

    block = next(
        b for b in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S) if "def bind" in b
    )
    space: dict[str, object] = {"__name__": __name__}
    exec(block, space)  # the guide's own code
    edit = space["ToMeanNorm"](heads="L1H2")  # type: ignore[operator]
    model = interp.load("llama")
    ids = torch.arange(12)[None]
    with torch.no_grad(), model.edit(edit), model.capture_z() as z:
        model(input_ids=ids)
    norms = z[1][0, :, 2].norm(dim=-1)
    torch.testing.assert_close(norms, norms[:1].expand(12))
    with torch.no_grad(), model.capture_z() as plain:
        model(input_ids=ids)
    assert float(plain[1][0, :, 2].norm(dim=-1).std()) > 1e-3
