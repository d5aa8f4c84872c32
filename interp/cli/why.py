"""`interp why`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import (
    BackendOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    QuantizationOption,
    RevisionOption,
    out,
)

if TYPE_CHECKING:
    from interp.look.why import Why


def why(
    head: Annotated[str, typer.Option(help="The head, as L18H6.")],
    text: Annotated[str, typer.Option(help="A text, or a text file.", metavar="TEXT|FILE")],
    model: ModelOption = "llama",
    query: Annotated[
        int | None,
        typer.Option(help="The token it looks from, by its place.", show_default="the last"),
    ] = None,
    key: Annotated[
        int | None,
        typer.Option(
            help="The token it looks at, by its place.",
            show_default="the one it looks at most, besides the first",
        ),
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            help="The token whose logit keys push, with its blank, like ' Mary'.",
            show_default="what the model says next",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="A token whose logit is taken off.", show_default="the vocabulary's mean"
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The text is a user's message, put into the template.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="How many rows of each table.")] = 10,
    json: Annotated[bool, typer.Option("--json", help="Print an object as JSON.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Fetch without asking.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    device_map: DeviceMapOption = None,
    quantization: QuantizationOption = None,
    revision: RevisionOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Why a head looks from one token at another: which earlier heads and MLPs made the score, and
    which tokens it moves the answer by."""
    from interp.inputs.text import content

    content(text)  # a wrong one is told of before a model is loaded
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
    found = loaded.why(text, head, query, key, answer=answer, against=against, chat=chat)
    if json:
        emit(found.to_dict(top))
    else:
        show(found, top)


def show(found: Why, top: int) -> None:
    """The pairs of writers that make the score, each side alone, and the keys by their push."""
    console, qk = out(), found.qk
    said = ", ".join(f"{name} {value}" for name, value in found.facts().items())
    title = f"{found.head} of {found.model}"
    console.print(Text.assemble((title, "bold"), f", {found.edge()}: {said}"), soft_wrap=True)
    grid = common.table("query's writer", "key's writer", "score", right=("score",))
    for row in found.top(top).itertuples():
        grid.add_row(row.query, row.key, f"{row.score:+.3f}")
    console.print(grid)
    for side, values in (("query", found.by_query()), ("key", found.by_key())):
        words = ", ".join(f"{name} {value:+.2f}" for name, value in values.head(5).items())
        console.print(Text.assemble((f"who wrote the {side}: ", "dim"), words), soft_wrap=True)
    if found.sources is not None:
        grid = common.table("key", "at", "weight", "adds", right=("at", "weight", "adds"))
        for row in found.keys(top).itertuples():
            grid.add_row(
                Text(row.token.strip() or "␣"), f"{row.key}", f"{row.weight:.3f}",
                f"{row.value:+.4f}",
            )  # fmt: skip
        console.print(f"\nWhat keys add to {found.toward()}, through this head alone", markup=False)
        console.print(grid)
    shown = min(top, len(qk.writers) ** 2)
    common.note(
        f"{shown} of {len(qk.writers) ** 2:,} pairs; all of them sum to the score, norms frozen."
    )
    for remark in found.notes:
        console.print(Text(remark, style="yellow"), soft_wrap=True)
