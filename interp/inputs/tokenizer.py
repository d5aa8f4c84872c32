"""A tokenizer with what prompts need of it: encoding in context, BOS, its chat template, pools of
single-token words, a token to pad with, and those that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from interp.errors import InputError
from interp_hooks.chatting import MARK, has_template, render
from interp_hooks.chatting import stop_tokens as stop_tokens
from interp_hooks.token_ids import check_text

#: everyday English, to see whether a tokenizer knows the language
EVERYDAY = (
    "We went out early because my friend wanted to see the big park before other people came, and "
    "she said that there would be time to eat when we got back home."
)
#: more tokens a word than this are a tokenizer's that spells everyday words out
SPELLED = 3.0


class Text:
    """A tokenizer with what the tasks need: encoding in context, BOS, its chat template, and
    single-token word pools."""

    def __init__(self, tokenizer: Any):
        if tokenizer is None:
            raise InputError(
                "This task needs a tokenizer and the model has none; pass tokenizer= when loading "
                "it."
            )
        self.tokenizer = tokenizer
        self._pools: dict[tuple[str, ...], list[str]] = {}

    def plain(self, text: str) -> list[int]:
        """Token ids of a whole text without special tokens."""
        return list(
            self.tokenizer.encode(check_text(text), add_special_tokens=False, verbose=False)
        )

    @cached_property
    def _prepends(self) -> bool:
        """Whether the tokenizer puts a space before every text (SentencePiece's habit: Llama 2,
        Mistral, Gemma 1), so that a piece encoded by itself isn't what stands in a text."""
        first = self.tokenizer.convert_ids_to_tokens(self.plain("a")[:1])
        return bool(first) and str(first[0]).startswith("\u2581")

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens, as the text stands after other text.

        A tokenizer that puts a space before every text would turn " Paris" into two tokens; in
        context it is one.
        """
        if not text or not self._prepends:
            return self.plain(text)
        if text[0] == " ":
            return self.plain(text[1:])
        before, whole = self.plain("\n"), self.plain("\n" + text)
        return whole[len(before) :] if whole[: len(before)] == before else self.plain(text)

    @cached_property
    def natural(self) -> bool:
        """Whether it knows natural English: everyday words come back as they were and are not
        spelled out (`SPELLED` tokens a word); the bundled models' don't."""
        ids = self.plain(EVERYDAY)
        same = self.tokenizer.decode(ids).strip() == EVERYDAY
        return bool(same) and len(ids) <= SPELLED * len(EVERYDAY.split())

    @property
    def has_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return has_template(self.tokenizer)

    def around_user(self, system: str | None = None) -> tuple[str, str]:
        """What the chat template puts before a user's words, and between them and the answer.

        Raises `InputError` for a tokenizer without a template, or one that has no place for a
        system prompt.
        """
        messages = [dict(role="user", content=MARK)]
        if system is not None:
            messages.insert(0, dict(role="system", content=system))
        before, _, after = render(self.tokenizer, messages).partition(MARK)
        return before, after

    def prompt(self, text: str) -> list[int]:
        """Token ids as the tokenizer makes a prompt: with BOS where its own default has one."""
        return list(self.tokenizer.encode(check_text(text), verbose=False))

    @property
    def bos(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text (often one BOS, sometimes
        none)."""
        with_special, plain = self.prompt("a"), self.plain("a")
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
