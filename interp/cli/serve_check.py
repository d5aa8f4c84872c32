"""`interp serve-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import err, note, out


def serve_check(
    model: Annotated[
        str, typer.Argument(help="Bundled name, alias, Hugging Face id or folder of a checkpoint.")
    ],
    edit: Annotated[
        Path,
        typer.Option("--edit", help="Edits, as `interp.edits.save` writes them.", metavar="FILE"),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A text to go on from; several times.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens generated from each prompt.")] = 12,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    ranks: Annotated[
        int, typer.Option("--tensor-parallel-size", min=1, help="Ranks that share the heads.")
    ] = 1,
    eager: Annotated[
        bool, typer.Option("--eager", help="Without torch.compile, which takes minutes to start.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparisons as JSON.")] = False,
) -> None:
    """Compare edits inside vLLM with the same edits in transformers, on your own model.

    Tokens, log-probabilities, and statistics of heads, under the edits and without. Ends with 1
    where something differs. Needs vLLM (docs/how-to/serve-an-edit.md installs it).
    """
    edits = common.load_edits(edit)
    from interp.serving.check import PROMPTS, check

    with err().status(f"Comparing {model} in vLLM with transformers …"):
        found = check(
            model,
            edits,
            prompts=prompt or PROMPTS,
            tokens=tokens,
            dtype=dtype,
            enforce_eager=eager,
            tensor_parallel_size=ranks,
        )
    if as_json:
        emit(found)
    else:
        grid = common.table("", "differs by", "at most", "", right=("differs by", "at most"))
        for one in found.comparisons:
            said = Text("equal", style="dim") if one.equal else Text("differs", style="red")
            if one.what.startswith("the edits move"):
                said = Text("yes", style="dim") if one.equal else Text("no", style="red")
            grid.add_row(one.what, f"{one.differs:.2g}", f"{one.bound:.2g}", said)
        out().print(grid)
        note(f"The edits move log-probabilities by up to {found.moves:.2g}.")
    if not found.equal:
        raise typer.Exit(1)
