"""Token ids and texts as they enter a model: what its embedding table has not is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from interp_hooks.errors import InputError

#: inputs of a forward that are looked up in the embedding table
NAMES = ("input_ids", "decoder_input_ids")
#: settings that name tokens whose embedding is never looked up: a picture's or a sound's stands
#: there, and some models give them ids past the table (LLaVA, PaliGemma) or below 0 (Phi-3)
PLACEHOLDER = re.compile(r"(image|video|audio|speech|vision)\w*_token_(id|index)")


def table_size(module: Any) -> int | None:
    """How many tokens a model embeds; None where it has no table, or does not say which it is."""
    get = getattr(module, "get_input_embeddings", None)
    try:
        table = get() if callable(get) else None
    except (NotImplementedError, AttributeError, TypeError):
        table = None
    size = getattr(table, "num_embeddings", None)
    if size is None:
        size = getattr(getattr(module, "cfg", None), "d_vocab", None)  # TransformerLens
    return size if isinstance(size, int) and size > 0 else None


def check(model: Any, arguments: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
    """Raise `InputError` for ids that the embedding table of `model` has not.

    A tokenizer may know more tokens than the model embeds: special tokens were added and the table
    was not resized, or it is another model's. PyTorch then says "index out of range", on a GPU for
    the whole process.

    Args:
        model: the `HookedModel`.
        arguments, inputs: of its forward or `generate`.
    """
    named = [inputs.get(name) for name in NAMES]
    given = [ids for ids in (*arguments[:1], *named) if _are_ids(ids)]
    size = table_size(model.module) if given else None
    if size is None:
        return
    for ids in given:
        if ids.device.type == "meta" or not ids.numel():
            continue
        low, high = (int(n) for n in torch.aminmax(ids))
        if low >= 0 and high < size:
            continue
        wrong = sorted(set(ids[(ids < 0) | (ids >= size)].tolist()) - placeholders(model.module))
        if wrong:
            raise InputError(_sentence(model, wrong[-1] if wrong[-1] >= size else wrong[0], size))


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and not value.is_floating_point()
        and not value.is_complex()
        and value.dtype != torch.bool
    )


def placeholders(module: Any) -> set[int]:
    """Ids that stand for what is no text, by the names of the model's settings."""
    config = getattr(module, "config", None)
    said = vars(config) if config is not None and hasattr(config, "__dict__") else {}
    return {v for k, v in said.items() if isinstance(v, int) and PLACEHOLDER.fullmatch(k)}


def _sentence(model: Any, token: int, size: int) -> str:
    known = _length(model.tokenizer)
    text = (
        f"{model.name} has no token {token}: its embedding table ends at {size - 1}"
        if token >= 0
        else f"{model.name} has no token {token}: tokens count from 0"
    )
    if known is not None and known > size:
        return (
            f"{text}, and its tokenizer knows {known} tokens; use the model's own tokenizer, or "
            "resize the table (resize_token_embeddings)."
        )
    return f"{text}; the ids are of another tokenizer."


def _length(tokenizer: Any) -> int | None:
    try:
        return len(tokenizer)
    except TypeError:
        return None


def check_text(text: Any) -> str:
    """`text` itself, if a tokenizer can read it.

    Raises `InputError` for what is no text, and for half of a surrogate pair, as bytes that are not
    UTF-8 become on a command line.
    """
    if not isinstance(text, str):
        raise InputError(f"A text is needed, not {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The text holds no character at place {error.start}, only half of one (bytes that are "
            "not UTF-8, or an emoji cut in two); write it as UTF-8."
        ) from error
    return text
