"""Procedures by name. A new procedure is one file here and one line in the stub, `__init__.pyi`,
which this registry and type checkers read."""

from __future__ import annotations

from typing import Any

from interp.support.lazy import listed
from interp.support.registry import Registry

registry: Registry[Any] = Registry(
    "procedure",
    "interp.procedures",
    listed("interp.procedures", __file__, ("catalogue",)),
    make=lambda entry: entry,
)


def get(name: str) -> Any:
    """The procedure called `name`.

    Raises:
        UnknownNameError: there is none.

    Example:
        >>> interp.procedures.get("ape").__name__
        'APE'
    """
    return registry.get(name)


def names() -> list[str]:
    """Names of all procedures.

    Example:
        >>> interp.procedures.names()[:5]
        ['ape', 'cca', 'damro', 'guidance', 'image_guidance']
    """
    return registry.names()
