"""Natural English, shipped with the toolkit: running text and haystacks for models that read it.

Essays, stories, dialogues and instructions written for this project, one a file in `english/`.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "english"


@cache
def passages() -> tuple[str, ...]:
    """All passages, in the order of their file names.

    Example:
        >>> from interp.inputs.english import passages
        >>> sum(len(passage.split()) for passage in passages()) > 10_000
        True
    """
    return tuple(p.read_text(encoding="utf-8").strip() for p in sorted(FOLDER.glob("*.txt")))


def shuffled(rng: np.random.Generator) -> list[str]:
    """All passages in an order drawn by `rng`."""
    return [passages()[i] for i in rng.permutation(len(passages()))]


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [s.strip() for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()]
