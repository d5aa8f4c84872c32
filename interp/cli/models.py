"""`interp models`."""

from __future__ import annotations

from rich.text import Text

from interp.cli.common import note, out, table


def models() -> None:
    """List the bundled models and the aliases for models on the Hugging Face hub."""
    from interp.models import catalog

    entries = list(catalog())
    # A bundled model's target is a folder of ours; its remark says more. The aliases share theirs:
    # said once, below.
    grid = table("name", "kind", "model")
    grid.columns[0].no_wrap = grid.columns[1].no_wrap = True
    for entry in entries:
        cell = Text(entry.note or entry.target) if entry.kind == "bundled" else Text(entry.target)
        grid.add_row(Text(entry.name, style="bold"), entry.kind, cell)
    out().print(grid)
    for remark in dict.fromkeys(e.note for e in entries if e.kind != "bundled" and e.note):
        note(f"Aliases are {remark}.")
    note("Any other Hugging Face id or folder works too.")
