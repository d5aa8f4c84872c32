"""`interp generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interp.cli import common
from interp.cli.common import BackendOption, DeviceOption, DtypeOption, EditOption, ModelOption


def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    model: ModelOption = "llama",
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="A picture for a vision-language model; again for several.", metavar="FILE"
        ),
    ] = None,
    edit: EditOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens to add at most.")
    ] = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Continue a text greedily, about pictures or none, with or without edits. Only the
    continuation goes to stdout."""
    from interp.errors import InputError

    if not prompt.strip():
        raise InputError("The prompt is empty; give some text to continue: --prompt TEXT.")
    edits = common.load_edits(edit) if edit is not None else []
    loaded = common.load(model, device, dtype, backend)
    if loaded.tokenizer is None:
        raise InputError(
            f"{loaded.name} has no tokenizer, so it can't read a prompt; choose another --model."
        )
    if image:
        from interp.vision.prompts import with_images

        inputs = with_images(loaded, prompt, image)
    else:
        inputs = loaded.tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if edits:
        with loaded.edit(*edits):
            ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    else:
        ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    # An encoder-decoder model returns only what it wrote, any other the prompt too.
    prompt_ids = inputs["input_ids"][0].to(ids.device)
    echoes = ids.shape[1] >= length and bool((ids[0, :length] == prompt_ids).all())
    typer.echo(loaded.tokenizer.decode(ids[0, length if echoes else 0 :], skip_special_tokens=True))
