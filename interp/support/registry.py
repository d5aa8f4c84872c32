"""One registry for everything that is found by name: tasks, scores, edits, models.

A built-in entry is one line, ``"name": "module:object"``, imported when first asked for;
third parties add theirs through an entry point of the registry's group.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from interp.errors import UnknownNameError

T = TypeVar("T")


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

    def add(self, name: str, entry: T) -> None:
        """Register an entry at run time (notebooks, tests)."""
        self._loaded[name] = entry

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
