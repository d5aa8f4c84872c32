"""The shape of the code of interp_kernels: a call is passed whole, imports run one way, and what is
public is documented by examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import interp_kernels

ROOT = Path(interp_kernels.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
#: Parameters a function may take; Triton kernels take pointers and strides one by one.
MOST = 8


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Decorated with @triton.jit, with or without options."""
    names = [ast.unparse(one).split("(")[0] for one in function.decorator_list]
    return "triton.jit" in names


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    several = [one for one in (given.vararg, given.kwarg) if one is not None]
    return len(given.posonlyargs + given.args + given.kwonlyargs + several)


def test_no_function_takes_more_than_eight_parameters() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": parameters(node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_kernel(node)
        if parameters(node) > MOST
    }
    assert not long


def module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere, functions and type checking included."""
    name, found = module(path), set()
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            origin = ".".join(part for part in base if part)
            inside = {f"{origin}.{one.name}" for one in node.names} & known
            found |= inside or {origin} & known
    return found - {name}


def test_no_import_goes_in_a_circle() -> None:
    known = {module(path) for path in FILES}
    graph = {module(path): imports(path, known) for path in FILES}
    list(TopologicalSorter(graph).static_order())  # raises where there is a circle


@pytest.mark.parametrize("name", ["dispatch", "request", "steer", "patterns", "softplus"])
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"interp_kernels.{name}")
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def test_what_is_public_says_what_it_takes() -> None:
    for name in interp_kernels.__all__:
        text = inspect.getdoc(getattr(interp_kernels, name)) or ""
        if name not in ("BackendError", "Result"):
            assert "Args:" in text and "Example:" in text and ">>> " in text, name
            assert "Raises:" in text or "`ValueError`" in text, name
