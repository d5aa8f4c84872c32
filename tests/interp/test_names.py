"""Every dotted name that README, docs and notebooks mention is there after a bare `import interp`;
listings hold the public names and nothing else; a wrong name is answered with the nearest ones."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

import interp

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "README.md").is_file())
PAGES = [
    p
    for folder in (".", "docs", "notebooks") for p in sorted((ROOT / folder).glob("*"))
    if p.suffix in (".md", ".ipynb") and p.name != "CHANGELOG.md"  # it names what was
]  # fmt: skip
LISTED = (
    "interp",
    "interp.calibration",
    "interp.circuits",
    "interp.edits",
    "interp.inputs",
    "interp.mechanics",
    "interp.probes",
    "interp.procedures",
    "interp.scores",
    "interp.tasks",
    "interp.vision",
    "interp_hooks",
)
#: entry-point groups and example files of the guide, which look like dotted names
GROUPS = {"interp.circuits", "interp.score_files", "interp.scores"}
MADE_UP = re.compile(r"interp\.[\w.]*\b(far|backwards|meeting|flip|twice|norm_change|best_scale)\b")


def text_of(page: Path) -> str:
    raw = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return raw
    return "\n".join("".join(cell["source"]) for cell in json.loads(raw)["cells"])


def dotted(text: str) -> set[str]:
    """interp.a.b and interp_hooks.a as they stand in the text, without what a call or an attribute
    of a value makes of them."""
    found = set(re.findall(r"(?<![\w./-])interp(?:_hooks|_kernels)?(?:\.[A-Za-z_]\w*)+", text))
    return {name for name in found if not name.endswith((".py", ".md", ".json", ".toml"))}


def test_names_in_prose_resolve() -> None:
    """After `import interp` alone, in a fresh interpreter."""
    pages = {
        page.name: [
            name
            for name in sorted(dotted(text_of(page)))
            if not MADE_UP.search(name) and not name.endswith((".Flip", ".Twice"))
            if name not in GROUPS
        ]
        for page in PAGES
    }
    assert sum(map(len, pages.values())) > 50
    script = (
        "import json, importlib, interp\n"
        f"pages = {pages!r}\n"
        "missing = []\n"
        "for page, names in pages.items():\n"
        "    for name in names:\n"
        "        head, *rest = name.split('.')\n"
        "        value = interp if head == 'interp' else importlib.import_module(head)\n"
        "        for i, part in enumerate(rest):\n"
        "            try: value = getattr(value, part)\n"
        "            except AttributeError:\n"
        "                if head == 'interp' and i == 0: missing.append((page, name)); break\n"
        "                try: value = importlib.import_module('.'.join([head, *rest[:i + 1]]))\n"
        "                except ImportError: missing.append((page, name)); break\n"
        "print(json.dumps(missing))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout) == []


@pytest.mark.parametrize("package", LISTED)
def test_listings_hold_the_public_names(package: str) -> None:
    module = importlib.import_module(package)
    stub = Path(str(module.__file__)).with_name("__init__.pyi")
    wanted = {
        alias.asname or alias.name
        for node in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(dir(module)) == set(module.__all__) == wanted
    for name in wanted:
        assert getattr(module, name) is not None


@pytest.mark.parametrize(
    ("module", "wrong", "right"),
    [
        ("interp", "scan_head", "scan_heads"),
        ("interp.edits", "Ablation", "Ablate"),
        ("interp.circuits", "fidn", "find"),
        ("interp.procedures", "Ape", "APE"),
        ("interp.scores", "gett", "get"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(module: str, wrong: str, right: str) -> None:
    with pytest.raises(AttributeError, match=f"did you mean .*{right}"):
        getattr(importlib.import_module(module), wrong)


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    """`interp.vision.overlay` is the function, also after its file was imported by itself."""
    script = (
        "import interp.vision.overlay, interp.mechanics.agreement, interp.inputs.forward\n"
        "import interp\n"
        "print(callable(interp.vision.overlay), callable(interp.mechanics.agreement),"
        " callable(interp.inputs.forward), callable(interp.overlay))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert run.stdout.split() == ["True"] * 4, run.stderr


def test_names_are_found_by_this_test() -> None:
    assert dotted("see `interp.edits.ACT` and interp.load('x').n; not my.interp.x") == {
        "interp.edits.ACT",
        "interp.load",
    }
    with pytest.raises(AttributeError):
        reduce(getattr, ["edits", "Nothing"], interp)
