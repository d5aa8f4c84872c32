"""Notebooks as pages: text, code, printed lines, and the PNG beside each interactive plot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def page(file: Path) -> str:
    """A notebook as markdown."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    head, *rest = (part for cell in cells for part in _cell(cell))
    where = f"The notebook `notebooks/{file.name}`, as it was last run."
    title, _, more = head.partition("\n")
    return "\n\n".join([title, where, more.strip(), *rest]) + "\n"


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"]).rstrip()
    if cell["cell_type"] == "markdown":
        yield source
    elif cell["cell_type"] == "code" and source:
        yield f"````python\n{source}\n````"
        for output in cell["outputs"]:
            yield from _output(output)


def _output(output: dict[str, Any]) -> Iterator[str]:
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        yield f'<img alt="What the cell above draws" src="data:image/png;base64,{picture}">'
    elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
        yield f"````text\n{text}\n````"
