"""`interp export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import DeviceOption, DtypeOption, ModelOption, RevisionOption, note, out


def export(
    edit: Annotated[
        Path,
        typer.Option(
            "--edit",
            help="Edits to bake, as JSON (what `interp.edits.save` writes): scale_heads, "
            "shift_heads, and ablate by zero or mean.",
            metavar="FILE",
        ),
    ],
    target: Annotated[Path, typer.Option("--out", "-o", help="Folder of the checkpoint.")],
    model: ModelOption = "llama",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what lies in the folder.")
    ] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was written as JSON.")
    ] = False,
) -> None:
    """Write a HuggingFace checkpoint with edits baked into its weights, which gives the same
    wherever it is served. It is loaded again and compared before it gets its name."""
    from interp.support.files import check_writable

    check_writable(target.parent)
    edits = common.load_edits(edit)
    loaded = common.load(model, device, dtype, revision=revision)
    import interp
    from interp.baking.export import RECORD

    folder = interp.export(loaded, edits, target, overwrite=overwrite)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if as_json:
        emit({"folder": str(folder), **record})
        return
    for one in edits:
        note(getattr(one, "phrase", repr(one)))
    note(
        f"Read again by transformers alone: logits differ by {record['differs']:.2g} at most from "
        f"those under the edits, which move them by up to {record['moves']:.2g}."
    )
    out().print(str(folder), soft_wrap=True)
