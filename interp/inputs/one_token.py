"""One token of the vocabulary, by its id or by its text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.errors import InputError
from interp_hooks.token_ids import check_text

if TYPE_CHECKING:
    from interp_hooks import HookedModel


def token_id(model: HookedModel, token: int | str, size: int) -> int:
    """The id of a token given by its id or by its text, of `size` in the vocabulary. Raises
    `InputError`."""
    if isinstance(token, str):
        if model.tokenizer is None:
            raise InputError(
                f"{model.name} came without a tokenizer, so tokens are given by their ids."
            )
        ids = model.tokenizer.encode(check_text(token), add_special_tokens=False)
        if len(ids) != 1:
            raise InputError(
                f"{token!r} is {len(ids)} tokens for this tokenizer; give text of one token, or "
                "its id."
            )
        token = int(ids[0])  # a tokenizer may know more than the model embeds
    if not 0 <= int(token) < size:
        raise InputError(f"There is no token {token}: ids go from 0 to {size - 1}.")
    return int(token)
