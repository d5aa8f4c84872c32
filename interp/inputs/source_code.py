"""Code to read, the second domain beside prose: the source of the interpreter's own standard
library, read at run time."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from interp.errors import InputError

#: a module shorter than this is mostly its imports
LEAST_CHARACTERS = 4_000


@cache
def modules() -> tuple[Path, ...]:
    """The top-level modules of the standard library that are worth reading, by name.

    Raises `InputError` where the interpreter came without their source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    found = [p for p in sorted(folder.glob("*.py")) if p.stat().st_size >= LEAST_CHARACTERS]
    if not found:
        raise InputError(
            "This Python came without the source of its standard library, which stands for code; "
            "install one with it."
        )
    return tuple(found)


def sources(rng: np.random.Generator) -> Iterator[str]:
    """The modules' source, in an order drawn by `rng`."""
    for i in rng.permutation(len(modules())):
        yield modules()[i].read_text(encoding="utf-8", errors="replace")
