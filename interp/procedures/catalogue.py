"""Procedures by name. A new procedure is one file here and one line in this list."""

from __future__ import annotations

from typing import Any

from interp.support.registry import Registry

registry: Registry[Any] = Registry(
    "procedure",
    "interp.procedures",
    {
        "ape": "interp.procedures.ape:APE",
        "guidance": "interp.procedures.guidance:guided_generate",
        "damro": "interp.procedures.damro:DAMRO",
        "ritual": "interp.procedures.ritual:RITUAL",
        "cca": "interp.procedures.cca:CCA",
    },
    make=lambda entry: entry,
)


def get(name: str) -> Any:
    """The procedure called `name`. Raises `UnknownNameError`."""
    return registry.get(name)


def names() -> list[str]:
    """Names of all procedures."""
    return registry.names()
