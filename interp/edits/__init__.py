"""Edits of attention, by name: declarative, saved as JSON. ``with model.edit(interp.edits.Ablate(["L2H3"])): …``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from interp.edits.base import HeadEdit, from_json, load, registry, save, to_json

if TYPE_CHECKING:
    from interp.edits.ablate import Ablate as Ablate
    from interp.edits.scale_heads import ScaleHeads as ScaleHeads

_HOME = {"Ablate": "ablate", "ScaleHeads": "scale_heads"}

__all__ = ["Ablate", "HeadEdit", "ScaleHeads", "from_json", "load", "registry", "save", "to_json"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"interp.edits.{_HOME[name]}"), name)
    raise AttributeError(f"module 'interp.edits' has no attribute {name!r}")
