"""A package's public names, imported when first used, as its stub lists them."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lazy_loader


def attach(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose public names stand in the stub
    beside it.

    The stub (`__init__.pyi`) is the one list of names: type checkers read it, and so does this.

    Args:
        package: the package's `__name__`. file: its `__file__`.

    Returns:
        the three, to be assigned in the package's `__init__.py`.
    """
    load, listed, names = lazy_loader.attach_stub(package, file)

    def get(name: str) -> Any:
        if name in names:
            return load(name)
        lower = {n.lower(): n for n in names}
        near = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
        hint = f"; did you mean {' or '.join(near)}?" if near and name[:2] != "__" else ""
        raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}", name=name)

    return get, listed, names


def listed(package: str, file: str, helpers: Collection[str]) -> dict[str, str]:
    """name → "module:attribute" of what a package's stub lists, for a registry: the first name of
    each module but the `helpers`, called as its module is.

    Args:
        package: the package's name. file: a file of the package. helpers: modules of it that the
            stub lists and that are no entries.
    """
    stub = ast.parse(Path(file).with_name("__init__.pyi").read_text(encoding="utf-8"))
    by_module: dict[str, str] = {}
    for line in stub.body:
        if isinstance(line, ast.ImportFrom) and line.module and line.module not in helpers:
            by_module.setdefault(line.module, f"{package}.{line.module}:{line.names[0].name}")
    return by_module
