"""A tokenizer with what prompts need of it: plain encoding, BOS, pools of single-token words, a
token to pad with, and those that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError

if TYPE_CHECKING:
    from interp_hooks.protocol import Model


class Text:
    """A tokenizer with what the tasks need: plain encoding, BOS, and single-token word pools."""

    def __init__(self, tokenizer: Any):
        if tokenizer is None:
            raise InputError(
                "This task needs a tokenizer and the model has none; pass tokenizer= when loading "
                "it."
            )
        self.tokenizer = tokenizer
        self._pools: dict[tuple[str, ...], list[str]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def prompt(self, text: str) -> list[int]:
        """Token ids as the tokenizer makes a prompt: with BOS where its own default has one."""
        return list(self.tokenizer.encode(text, verbose=False))

    @property
    def bos(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text (often one BOS, sometimes
        none)."""
        with_special, plain = self.prompt("a"), self.encode("a")
        return (
            with_special[: max(0, with_special.index(plain[0]))]
            if plain and plain[0] in with_special
            else []
        )

    def pool(self, words: Sequence[str], at_least: int = 2, what: str = "words") -> list[str]:
        """The words that are one token (with a leading space). Raises `InputError` if too few
        are."""
        key = tuple(words)
        if key not in self._pools:
            # one token too, the same for all words
            unknown = getattr(self.tokenizer, "unk_token_id", None)
            self._pools[key] = [
                w for w in key if len(ids := self.encode(" " + w)) == 1 and ids[0] != unknown
            ]
        pool = self._pools[key]
        if len(pool) < at_least:
            raise InputError(
                f"Only {len(pool)} of the {len(words)} {what} of this task are single tokens for "
                "this tokenizer "
                f"(it needs {at_least}); choose another task or model."
            )
        return pool

    def one(self, word: str) -> int:
        """The id of a single-token word."""
        return self.encode(" " + word)[0]

    def vocabulary(self) -> np.ndarray:
        """Ids of all ordinary tokens (no special, no added tokens), sorted."""
        special = set(self.tokenizer.all_special_ids) | set(
            getattr(self.tokenizer, "added_tokens_decoder", {})
        )
        return np.array(sorted(i for i in self.tokenizer.get_vocab().values() if i not in special))


def pad_id(tokenizer: Any) -> int:
    """A token to pad with; it is masked, so any valid id will do."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0


def stop_tokens(model: Model) -> set[int]:
    """The tokens that end a text, as the model's own generation settings have them."""
    tokens = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    if tokens is None:
        tokens = getattr(model.tokenizer, "eos_token_id", None)
    return set() if tokens is None else {tokens} if isinstance(tokens, int) else set(tokens)
