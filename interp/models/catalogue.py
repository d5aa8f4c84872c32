"""The names that `interp.load` takes, as `interp models` lists them."""

from __future__ import annotations

from dataclasses import dataclass

from interp.models.drawing import WEIGHTS
from interp.models.names import ALIASES, BUNDLED, EYES, FOLDER, SHORTCUTS


@dataclass(frozen=True)
class Entry:
    """A name that `interp.load` takes.

    Attributes:
        name: what to write.
        kind: "bundled" or "alias".
        target: its folder, or its hub id.
        note: what else to know.

    Example:
        >>> interp.models.catalog()[0].name
        'pocket-llama'
    """

    name: str
    kind: str
    target: str
    note: str = ""


def catalog() -> list[Entry]:
    """Bundled models with their shortcuts, then aliases.

    Example:
        >>> [e.target for e in interp.models.catalog() if e.name == "gpt2"]
        ['openai-community/gpt2']
    """
    entries = []
    for name, folder in BUNDLED.items():
        shortcuts = ", ".join(s for s, (target, _) in SHORTCUTS.items() if target == name)
        there = any((FOLDER / folder / weights).is_file() for weights in WEIGHTS)
        here = "" if there else " (not trained here yet)"
        entries.append(
            Entry(name, "bundled", folder, f"shortcut: {shortcuts}; works offline{here}")
        )
    for name, eye in EYES.items():
        about = f"an eye for {eye.language}: works offline once that is in the cache"
        entries.append(Entry(name, "bundled", eye.folder, about))
    note = "downloaded from the hub when asked for"
    return entries + [Entry(name, "alias", target, note) for name, target in ALIASES.items()]
