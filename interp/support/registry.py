"""One registry for everything that is found by name: tasks, scores, edits, models.

A built-in entry is one line, ``"name": "module:object"``, imported when first asked for;
third parties add theirs through an entry point of the registry's group.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, TypeVar

from interp.errors import UnknownNameError
from interp_hooks.whole_numbers import quoted

T = TypeVar("T")

#: attributes that say what an entry is, in this order
SAID = ("summary", "what", "title")


class Registry(Generic[T]):
    """Names to objects, loaded lazily.

    Args:
        kind: what the entries are, for error messages ("score", "task", …).
        group: entry-point group that third parties use, e.g. ``interp.scores``.
        builtin: name → ``"module:attribute"``.
        make: turns the loaded attribute into the entry (a class into an instance, say).
    """

    def __init__(
        self,
        kind: str,
        group: str,
        builtin: dict[str, str],
        make: Callable[[object], T],
    ):
        self.kind, self.group, self._make = kind, group, make
        self._paths = dict(builtin)
        self._loaded: dict[str, T] = {}
        self._scanned = False

    def _scan(self) -> None:
        if not self._scanned:
            self._scanned = True
            for point in entry_points(group=self.group):
                self._paths.setdefault(point.name, point.value)

    def names(self) -> list[str]:
        """All registered names, built-ins first, in order of registration."""
        self._scan()
        return list(self._paths) + [n for n in self._loaded if n not in self._paths]

    def get(self, name: str) -> T:
        """The entry called `name`. Raises `UnknownNameError` with the nearest names."""
        if not isinstance(name, str):
            raise UnknownNameError(
                f"A {self.kind} is named by a text, not {quoted(name)}; there are: "
                f"{', '.join(self.names())}."
            )
        if name not in self._loaded:
            self._scan()
            if name not in self._paths:
                near = difflib.get_close_matches(name, self.names(), n=3, cutoff=0.5)
                hint = (
                    f"did you mean {' or '.join(near)}?"
                    if near
                    else f"there are: {', '.join(self.names())}."
                )
                raise UnknownNameError(f"There is no {self.kind} called {name!r}; {hint}")
            module, _, attribute = self._paths[name].partition(":")
            self._loaded[name] = self._make(getattr(import_module(module), attribute))
        return self._loaded[name]

    def summary(self, name: str) -> str:
        """What the entry called `name` is, in a phrase: its `summary`, `what` or `title`, or the
        first sentence of its docstring. Read from the source, so that nothing is imported."""
        if name in self._loaded:
            entry = self._loaded[name]
            said = next(
                (getattr(entry, a) for a in SAID if isinstance(getattr(entry, a, 0), str)), ""
            )
            return said or _sentence(entry.__doc__ or "")
        self._scan()
        module, _, attribute = self._paths[name].partition(":")
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            return ""
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == attribute:
                return _assigned(node) or _sentence(ast.get_docstring(node) or "")
        return ""

    def summaries(self) -> dict[str, str]:
        """name → summary of every entry."""
        return {name: self.summary(name) for name in self.names()}

    def add(self, name: str, entry: T) -> None:
        """Register an entry at run time (notebooks, tests)."""
        self._loaded[name] = entry

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


def _assigned(node: ast.AST) -> str:
    """The value of the first of `SAID` that a class body assigns as text."""
    texts: dict[str, str] = {}
    for line in getattr(node, "body", ()):
        if not isinstance(line, ast.Assign):
            continue
        for target in line.targets:
            several = isinstance(target, ast.Tuple) and isinstance(line.value, ast.Tuple)
            pairs = (
                zip(target.elts, line.value.elts, strict=False)  # type: ignore[attr-defined]
                if several
                else [(target, line.value)]
            )
            for name, value in pairs:
                if isinstance(name, ast.Name) and isinstance(value, ast.Constant):
                    texts[name.id] = str(value.value)
    return next((texts[a] for a in SAID if a in texts), "")


def _sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    first = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", first)[0]
