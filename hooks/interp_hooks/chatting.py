"""Chats: messages through a tokenizer's template, the answer, and where answers end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from interp_hooks.errors import InputError
from interp_hooks.token_ids import check_text
from interp_hooks.whole_numbers import quoted, whole

if TYPE_CHECKING:
    from interp_hooks.protocol import Model

#: what stands for someone's words while a template is rendered
MARK = "\u241fwords\u241f"


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], answer: bool = True) -> str:
    """Messages as the chat template writes them, with what opens the answer where `answer`.

    Raises `InputError` for a tokenizer without a template, one that can't be filled in, and one
    that leaves out what the system says.
    """
    if not has_template(tokenizer):
        raise InputError(
            "This tokenizer has no chat template; use another format, or a model tuned for chat."
        )
    try:
        text = str(
            tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=answer
            )
        )
    except Exception as reason:  # templates raise what they like
        raise InputError(
            f"The chat template of this tokenizer can't be filled in: {reason}"
        ) from reason
    for message in messages:
        if message["role"] == "system" and message["content"].strip() not in text:
            raise InputError("The chat template of this tokenizer leaves out system prompts.")
    return text


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that the chat template writes after an assistant's words; None where there is
    none."""
    turn = [dict(role="user", content=MARK), dict(role="assistant", content=MARK)]
    _, _, after = render(tokenizer, turn, answer=False).rpartition(MARK)
    ids = tokenizer.encode(after.lstrip(), add_special_tokens=False) if after.strip() else []
    return int(ids[0]) if ids else None


def stop_tokens(model: Model) -> set[int]:
    """The tokens that end a text, as the model's own generation settings have them."""
    tokens = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    if tokens is None:
        tokens = getattr(model.tokenizer, "eos_token_id", None)
    return set() if tokens is None else {tokens} if isinstance(tokens, int) else set(tokens)


def tuned_for_chat(model: Model) -> bool:
    """Whether a model is tuned for its tokenizer's chat template: what the template ends an
    assistant's turn with is a token that the model stops at.

    Base models that share a tokenizer with a tuned one (Qwen's) have the template and stop at
    another token.
    """
    if not has_template(model.tokenizer):
        return False
    try:
        return end_of_turn(model.tokenizer) in stop_tokens(model)
    except InputError:  # a template that wants other messages says nothing of the model
        return False


def conversation(
    messages: str | Sequence[Mapping[str, str]], system: str | None = None
) -> list[dict[str, str]]:
    """Messages in the form of chat templates, the system prompt first.

    Args:
        messages: what the user says, or ``{"role": …, "content": …}`` in order.
        system: a system prompt; None for the template's own, if it has one.

    Raises `InputError` for no messages, what is none, two system prompts, or an answer that is
    already there.
    """
    turns: Any = [dict(role="user", content=messages)] if isinstance(messages, str) else messages
    if not isinstance(turns, Sequence) or not all(
        isinstance(m, Mapping)
        and isinstance(m.get("role"), str)
        and isinstance(m.get("content"), str)
        for m in turns
    ):
        raise InputError(
            'A chat is a text, or messages like {"role": "user", "content": "Hello"}, not '
            f"{messages!r}."
        )
    turns = [dict(m) for m in turns]
    if not turns or not turns[-1]["content"].strip():
        raise InputError("The chat has no message to answer; give some text.")
    if turns[-1]["role"] in ("assistant", "system"):
        raise InputError(
            f"The last message of the chat is the {turns[-1]['role']}'s; end with the user's."
        )
    if system is not None:
        if turns[0]["role"] == "system":
            raise InputError("The chat has a system message already; leave out system=.")
        turns.insert(0, dict(role="system", content=system))
    return turns


def chat_inputs(
    model: Model, messages: str | Sequence[Mapping[str, str]], system: str | None = None
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (1, tokens) of a chat, up to where the answer begins. Raises
    `InputError`."""
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer, so it can't read a chat.")
    text = check_text(render(model.tokenizer, conversation(messages, system)))
    # the template writes the special tokens itself, a BOS too
    ids = torch.tensor([model.tokenizer.encode(text, add_special_tokens=False)])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def new_tokens(prompt: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(tokens,) what `generate` added to a prompt (1, tokens): an encoder-decoder model returns
    only what it wrote, any other the prompt too."""
    length = prompt.shape[1]
    echoes = ids.shape[1] >= length and bool((ids[0, :length] == prompt[0].to(ids.device)).all())
    return ids[0, length if echoes else 0 :]


def why_empty(model: Model, said: torch.Tensor) -> str | None:
    """Why an answer (tokens,) shows nothing, as a sentence without its full stop; None where it
    shows something."""
    text = model.tokenizer.decode(said, skip_special_tokens=True)
    if text.strip():
        return None
    if not len(said):
        return f"{model.name} wrote no token"
    first = int(said[0])
    shown = model.tokenizer.convert_ids_to_tokens([first])[0]
    if first in stop_tokens(model):
        return f"{model.name} ended at once: its first token is {shown}, which ends a text"
    return (
        f"{model.name} wrote nothing but blanks and special tokens ({len(said)}), {shown!r} first"
    )


def chat(
    model: Any,
    messages: str | Sequence[Mapping[str, str]],
    system: str | None = None,
    max_new_tokens: int = 64,
) -> str:
    """The model's greedy answer to a chat, without special tokens and outer blanks.

    `HookedModel.chat` says what it takes and raises.
    """
    count = whole(max_new_tokens)
    if count is None or count < 1:
        raise InputError(f"max_new_tokens counts tokens, from 1, not {quoted(max_new_tokens)}.")
    inputs = chat_inputs(model, messages, system)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    said = new_tokens(inputs["input_ids"], ids)
    nothing = why_empty(model, said)
    if nothing is not None:
        warnings.warn(f"{nothing}.", stacklevel=3)
    return str(model.tokenizer.decode(said, skip_special_tokens=True)).strip()
