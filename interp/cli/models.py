"""`interp models`."""

from __future__ import annotations

from rich.text import Text

from interp.cli.common import note, out, table


def models() -> None:
    """List the bundled models and the aliases for models on the Hugging Face hub."""
    from interp.models import catalog

    made = table("name", "kind", "model", "note")
    made.columns[0].no_wrap = True
    for entry in catalog():
        made.add_row(Text(entry.name, style="bold"), entry.kind, Text(entry.target or ""), Text(entry.note or ""))
    out().print(made)
    note("Any other Hugging Face id or folder works too. Nothing is downloaded before you name it.")
