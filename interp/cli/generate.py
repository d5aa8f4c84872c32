"""`interp generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
)


def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue, or a chat's message to answer.")],
    model: ModelOption = "llama",
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="A picture for a vision-language model; again for several.", metavar="FILE"
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt into the tokenizer's chat template, or continue it as it is.",
            show_default="continue; a chat with --system",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system prompt before the message; makes it a chat.")
    ] = None,
    edit: EditOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens to add at most.")
    ] = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    device_map: DeviceMapOption = None,
    quantization: QuantizationOption = None,
    revision: RevisionOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Continue a text or answer a chat greedily, about pictures or none, with or without edits.
    Only what the model writes goes to stdout."""
    from interp.errors import InputError
    from interp_hooks.chatting import new_tokens, why_empty

    if not prompt.strip():
        raise InputError("The prompt is empty; give some text to continue: --prompt TEXT.")
    if chat is False and system is not None:
        raise InputError("A system prompt is a chat's; leave out --system, or --no-chat.")
    edits = common.load_edits(edit) if edit is not None else []
    loaded = common.load(
        model,
        device,
        dtype,
        backend,
        device_map=device_map,
        quantization=quantization,
        revision=revision,
    )
    if loaded.tokenizer is None:
        raise InputError(
            f"{loaded.name} has no tokenizer, so it can't read a prompt; choose another --model."
        )
    if image:
        from interp.vision.prompts import with_images

        if chat is not None or system is not None:
            raise InputError(
                "A prompt with pictures goes through its processor's own template; leave out "
                "--chat, --no-chat and --system."
            )
        inputs = with_images(loaded, prompt, image)
    else:
        chat = _is_chat(loaded, chat, system)
        inputs = _inputs(loaded, prompt, chat, system)
    if edits:
        with loaded.edit(*edits):
            ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    else:
        ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    said = new_tokens(inputs["input_ids"], ids)
    nothing = why_empty(loaded, said)
    if nothing is not None:
        common.note(f"{nothing}; {_advice(loaded, bool(image), chat)}.")
        return
    typer.echo(loaded.tokenizer.decode(said, skip_special_tokens=True))


def _is_chat(loaded: Any, chat: bool | None, system: str | None) -> bool:
    """Whether the prompt is a chat's, as in `interp.model.Model.generate` where it is asked for; a
    hint where a model tuned for chats just goes on."""
    from interp_hooks.chatting import tuned_for_chat

    if chat is not None or system is not None:
        return chat is not False
    if tuned_for_chat(loaded):
        common.note(f"{loaded.name} is tuned for chat: --chat asks it in its chat template.")
    return False


def _inputs(loaded: Any, prompt: str, chat: bool, system: str | None) -> Any:
    """The prompt's tokens. Raises `InputError` where there is no template to put it into."""
    from interp.errors import InputError
    from interp_hooks.chatting import chat_inputs, has_template
    from interp_hooks.token_ids import check_text

    if not chat:
        return loaded.tokenizer(check_text(prompt), return_tensors="pt")
    if not has_template(loaded.tokenizer):
        raise InputError(
            f"The tokenizer of {loaded.name} has no chat template; leave out --chat and --system, "
            "or choose a model tuned for chat."
        )
    return chat_inputs(loaded, prompt, system)


def _advice(loaded: Any, image: bool, chat: bool | None) -> str:
    """What to try where a model wrote nothing."""
    from interp_hooks.chatting import has_template

    if not image and not chat and has_template(loaded.tokenizer):
        return "try --chat, which puts the prompt into the tokenizer's chat template"
    return "try another prompt"
