"""`interp look`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from interp.cli import common
from interp.cli.common import (
    BackendOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    EditOption,
    ModelOption,
    QuantizationOption,
    RevisionOption,
    out,
)

if TYPE_CHECKING:
    from interp.look.look import Look

#: rows that the terminal shows, of tokens that put so much weight past the first
ROWS, LEAST = 24, 0.1
HEADINGS = ("#", "token", "looks at", "at", "weight", "past the first", "at", "weight")


def look(
    head: Annotated[str, typer.Option(help="The head, as L18H6.")],
    text: Annotated[str, typer.Option(help="A text, or a text file.", metavar="TEXT|FILE")],
    model: ModelOption = "llama",
    chat: Annotated[
        bool, typer.Option("--chat", help="The text is a user's message, put into the template.")
    ] = False,
    edit: EditOption = None,
    page: Annotated[
        Path | None,
        typer.Option("--out", help="A page to write: every token to point at.", metavar="FILE"),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Also save the numbers, as a safetensors file.", metavar="FILE"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a row a token as JSON.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Fetch without asking.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    device_map: DeviceMapOption = None,
    quantization: QuantizationOption = None,
    revision: RevisionOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Where a head looks in a text: what each token looks at most, and a page to walk through."""
    from interp.inputs.text import content
    from interp.support.files import check_writable

    common.check_heads([head], model)
    content(text)  # a wrong one is told of before a model is loaded
    for file in (page, save):
        if file is not None:
            check_writable(file.parent)
    edits = common.load_edits(edit) if edit is not None else []
    loaded = common.load(
        model,
        device,
        dtype,
        backend,
        yes,
        device_map=device_map,
        quantization=quantization,
        revision=revision,
    )
    result = loaded.look(text, head, chat=chat, edits=edits)
    if json:
        typer.echo(result.frame.to_json(orient="records", force_ascii=False))
    else:
        show(result)
    if save is not None:
        common.note(f"numbers: {result.save(save)}")
    if page is not None:
        common.note(f"page: {result.report(page)}")
    elif not json:
        common.note("Every token, both ways, by weight and by value: --out page.html")


def show(result: Look) -> None:
    """The tokens that look hardest past the first one, in the order of the text: where each looks
    most, the first token included, and where most past it."""
    from interp.report.look_page import facts

    console = out()
    said = ", ".join(f"{name.lower()} {value}" for name, value in facts(result).items() if value)
    console.print(Text.assemble((f"{result.head} of {result.model}", "bold"), f": {said}"),
                  soft_wrap=True)  # fmt: skip
    frame = result.frame
    past = "past_first_weight"
    some = frame[frame[past] >= LEAST]
    rows = (some if len(some) else frame[frame[past] > 0]).nlargest(ROWS, past).sort_index()
    if rows.empty:
        console.print("No token looks at any but the first.")
        return
    grid = common.table(*HEADINGS, right=("#", "at", "weight"))
    for place, row in rows.iterrows():
        elsewhere = row["at"] != row.past_first_at
        grid.add_row(
            f"{place}",
            Text(_visible(row.token)),
            Text(_visible(row.looks_at)),
            f"{row['at']}",
            f"{row.weight:.2f}",
            Text(_visible(row.past_first) if elsewhere else "the same", "" if elsewhere else "dim"),
            f"{row.past_first_at}" if elsewhere else "",
            f"{row.past_first_weight:.2f}" if elsewhere else "",
        )
    console.print(grid)
    if len(rows) < len(frame):
        common.note(f"The {len(rows)} of {len(frame):,} tokens that look hardest past the first.")
    for remark in result.notes:
        console.print(Text(remark, style="yellow"), soft_wrap=True)


def _visible(token: str) -> str:
    """A token as it stands in a table's cell."""
    return token.strip(" ").replace("\n", "↵").replace("\t", "⇥") or "␣"
