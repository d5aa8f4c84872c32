"""How scenes are told and asked about."""

from __future__ import annotations

import re

from interp.scenes.world import COLORS, COLUMNS, OBJECTS, ROWS, Scene

DESCRIBE = "describe the picture :"
#: Every word of captions, questions and answers.
WORDS: tuple[str, ...] = (
    *OBJECTS,
    *COLORS,
    *ROWS,
    *COLUMNS,
    *"describe the picture : is there a an and . ? yes no , in this what color where it at of with "
    "on".split(),
)


def caption(scene: Scene) -> str:
    """a red table top left and a blue chair middle right ."""
    return " and ".join(f"a {t.color} {t.name} {t.place}" for t in scene.things) + " ."


def question(name: str) -> str:
    return f"is there a {name} ?"


def mentions(text: str) -> list[str]:
    """The objects that a text names, each once, in the order they come."""
    words = re.findall(r"[a-z]+", text.lower())
    return list(dict.fromkeys(word for word in words if word in OBJECTS))
