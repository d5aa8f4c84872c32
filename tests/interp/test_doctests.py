"""The examples in docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import interp

PACKAGES = ("interp", "interp_hooks", "interp_kernels", "interp_vllm")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

#: public names without an example: errors are raised, not called; registries and lists are data
NO_EXAMPLE = {"InterpError", "ServingError", "registry", "controls", "EDITS", "STATISTICS"}


def _files(kind: str) -> Iterator[tuple[str, Path]]:
    """(module, file) of the packages as installed, files named `kind`."""
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
        for file in sorted(root.rglob(kind)):
            parts = file.relative_to(root).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), file


def _with_examples() -> list[str]:
    return [name for name, file in _files("*.py") if ">>> " in file.read_text(encoding="utf-8")]


def _public() -> list[tuple[str, str]]:
    """(package, name) of what the stubs list."""
    packages = [name for name, _ in _files("__init__.pyi")]
    return [(p, name) for p in packages for name in import_module(p).__all__]


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, Any]]:
    """What examples know beside the names of their module; all on the CPU, as they are printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        model = interp.load("llama")
        atlas = interp.scan_heads(model, ["previous_token"], context=64, samples=2, progress=False)
        circuit = interp.circuits.find(model, "ioi", "head_ablation", n=8)
        yield dict(interp=interp, torch=torch, np=np, model=model, atlas=atlas, circuit=circuit)


@pytest.mark.slow
@pytest.mark.parametrize("name", _with_examples())
def test_examples_run(
    name: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for those that write files
    runner, said = doctest.DocTestRunner(optionflags=FLAGS), list[str]()
    for example in doctest.DocTestFinder().find(import_module(name), name):
        example.globs.update(names)
        runner.run(example, out=said.append)
    assert runner.tries, f"no example of {name} was found"
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize(("package", "name"), _public())
def test_public_names_have_examples(package: str, name: str) -> None:
    public = getattr(import_module(package), name)
    if isinstance(public, (ModuleType, Path)) or name in NO_EXAMPLE or name.startswith("__"):
        return
    said = inspect.getdoc(public) or ""
    assert ">>> " in said, f"{package}.{name} has no example"
    assert not said.splitlines()[1], f"the first line of {package}.{name} does not stand by itself"
