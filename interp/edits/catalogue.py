"""Edits by name. A new edit is one file here and one line in the stub, `__init__.pyi`, which this
registry and type checkers read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.support.lazy import listed
from interp.support.registry import Registry

if TYPE_CHECKING:
    from interp.edits.head_edit import HeadEdit

FITS = ("fit_crest", "fit_iti", "fit_paint", "fit_sadi", "fit_seka", "fit_vhr")
HELPERS = ("catalogue", "files", "head_edit", "keys", *FITS)

registry: Registry[type[HeadEdit]] = Registry(
    "edit",
    "interp.edits",
    listed("interp.edits", __file__, HELPERS),
    make=lambda cls: cls,  # type: ignore[arg-type, return-value]
)


def names() -> list[str]:
    """Names of all edits, the built-in ones first.

    Returns:
        what `--edit` and the JSON form call them.

    Example:
        >>> interp.edits.names()[:3]
        ['ablate', 'act', 'gate']
    """
    return registry.names()
