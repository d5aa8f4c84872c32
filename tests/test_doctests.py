"""The examples in docstrings run, and every public name has one."""

from __future__ import annotations

import ast
import doctest
import inspect
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp

PACKAGES = ("interp", "interp_hooks", "interp_kernels")


def _modules() -> list[str]:
    """Modules of the three packages, as installed, that hold an example."""
    found = []
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
        for file in sorted(root.rglob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                parts = file.relative_to(root).with_suffix("").parts
                found.append(".".join((package, *(p for p in parts if p != "__init__"))))
    return found


@pytest.mark.parametrize("name", _modules())
def test_examples_run(name: str, pocket: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """In each example `interp`, `torch`, `np` and `model`, the bundled pocket-llama, are known."""
    monkeypatch.chdir(tmp_path)
    module = import_module(name)
    names = {"interp": interp, "torch": torch, "np": np, "model": pocket}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        example.globs.update(names)
        runner.run(example, out=said.append)
    assert runner.tries, f"no example of {name} was found"
    assert not runner.failures, "".join(said)
