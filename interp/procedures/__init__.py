"""Procedures: what is more than an edit of one attention call.
``interp.procedures.APE().generate(model, …)``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from interp.registry import Registry

if TYPE_CHECKING:
    from interp.procedures.ape import APE as APE
    from interp.procedures.cca import CCA as CCA
    from interp.procedures.damro import DAMRO as DAMRO
    from interp.procedures.guidance import guided_generate as guided_generate
    from interp.procedures.guidance import guided_logits as guided_logits
    from interp.procedures.ritual import RITUAL as RITUAL

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

_HOME = {
    "APE": "ape",
    "CCA": "cca",
    "DAMRO": "damro",
    "RITUAL": "ritual",
    "guided_generate": "guidance",
    "guided_logits": "guidance",
}

__all__ = [*_HOME, "get", "names", "registry"]


def get(name: str) -> Any:
    """The procedure called `name`. Raises `UnknownNameError`."""
    return registry.get(name)


def names() -> list[str]:
    """Names of all procedures."""
    return registry.names()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"interp.procedures.{_HOME[name]}"), name)
    raise AttributeError(f"module 'interp.procedures' has no attribute {name!r}")
