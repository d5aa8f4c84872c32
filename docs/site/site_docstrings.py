"""What the site does with docstrings: sections by their heading, and mkdocstrings' reading of
them."""

from __future__ import annotations

import inspect
import re
from typing import Any

MISLEADS = "Misleads"


def section(documented: Any, heading: str) -> str:
    """The text under "Heading:" in a docstring, dedented; "" if there is none.

    Example:
        >>> def shy(): '''Hides.
        ...
        ...     Misleads:
        ...         In the dark.
        ...     '''
        >>> section(shy, "Misleads")
        'In the dark.'
    """
    text = inspect.cleandoc(documented.__doc__ or "")
    found = re.search(rf"^{heading}:\n((?:(?: +.*)?\n?)*)", text, re.MULTILINE)
    return inspect.cleandoc(found[1]).strip() if found else ""


def without(text: str, heading: str) -> str:
    """A cleaned docstring without one of its sections."""
    return re.sub(rf"^{heading}:\n(?:(?: +.*)?\n?)*", "", text, flags=re.MULTILINE).strip()


def first_sentence(documented: Any) -> str:
    """The first paragraph of a docstring, up to its first full stop."""
    text = " ".join(inspect.cleandoc(documented.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s(?=[A-Z(])", text)[0]


try:
    from griffe import Extension
except ImportError:  # the pages can be made without mkdocstrings
    Extension = object


class Docstrings(Extension):  # type: ignore[misc, valid-type]
    """For mkdocstrings: "Example:" holds code, as "Examples:" does for griffe; what misleads has
    a place of its own on the catalogue's pages."""

    def on_instance(self, *, node: Any = None, obj: Any = None, **kwargs: Any) -> None:
        if obj is not None and obj.docstring:
            text = obj.docstring.value
            text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
            text = without(inspect.cleandoc(text), MISLEADS)
            # "model, head: names." are two; griffe takes what follows a blank for a type
            several = re.compile(r"^ {4}\w+(?:, \w+)+(?=: )", re.MULTILINE)
            obj.docstring.value = several.sub(lambda m: m[0].replace(", ", ",\u00a0"), text)
