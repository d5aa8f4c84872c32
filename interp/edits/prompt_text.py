"""Texts as sets of keys: which tokens of the prompt at hand spell them, sample by sample."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interp.errors import EditError

if TYPE_CHECKING:
    import torch

    from interp_hooks.call import AttentionCall

#: how much of a prompt an error shows
SHOWN = 60


def locate(tokenizer: Any, ids: Sequence[int], text: str) -> tuple[int, int] | None:
    """The tokens start … stop − 1 of `ids` that overlap the last place where they spell `text`;
    None where they don't.

    Found by the characters that prefixes of the tokens decode to, so that a text may begin and end
    within tokens, and a character may be several tokens (bytes). A binary search: a few decodings,
    not one a token.

    Raises `EditError` for a tokenizer that decodes the tokens found by themselves to another text.
    """
    whole = _decode(tokenizer, ids)
    first = whole.rfind(text)
    if first < 0:
        return None

    def prefix(i: int) -> tuple[int, bool]:
        """How many characters of the whole the first i tokens spell, and whether they end between
        characters."""
        part = _decode(tokenizer, ids[:i])
        if whole.startswith(part):
            return len(part), True
        pairs = zip(part, whole, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), len(whole)), False

    def reach(i: int) -> int:
        return prefix(i)[0]

    n = len(ids)
    # the last boundary at or before the first character, the first one at or after the last
    start = bisect_right(range(n + 1), first, key=reach) - 1
    stop = bisect_left(range(n + 1), first + len(text), key=reach)
    while start > 0 and reach(start) == first and not prefix(start)[1]:
        start -= 1  # the bytes that begin the first character
    if text.strip() not in _decode(tokenizer, ids[start:stop]):
        raise EditError(
            f"The text {text!r} can't be placed among the tokens of the prompt, which this "
            "tokenizer decodes differently by themselves; name its positions, Span(start, stop)."
        )
    return start, stop


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


class PromptText:
    """The tokens of a text in the prompts of one block of one model.

    Args:
        text: as the tokenizer decodes it.
        tokenizer: the model's.
    """

    def __init__(self, text: str, tokenizer: Any) -> None:
        self.text, self.tokenizer = text, tokenizer
        # the prompt last seen (the same tensor in all layers and steps) and where the text is in it
        self._seen: tuple[torch.Tensor, list[tuple[int, int]]] | None = None

    def slots(self, call: AttentionCall) -> list[tuple[int, int]]:
        """(start, stop) slots of the padded sequence for each sample; of several places the last.

        Raises `EditError` where the tokens are not known, and where a sample has no such text.
        """
        tokens = call.tokens
        if tokens is None:
            raise EditError(
                f"The text {self.text!r} is looked for in the prompt's tokens, which are not known "
                "here: the prompt was read before the edit's block, given as embeddings, or "
                "goes to an encoder; name positions, Span(start, stop)."
            )
        if self._seen is None or self._seen[0] is not tokens:
            rows = tokens.tolist()
            self._seen = tokens, [self._place(row, i, len(rows)) for i, row in enumerate(rows)]
        return self._seen[1]

    def _place(self, row: list[int], sample: int, samples: int) -> tuple[int, int]:
        real = [slot for slot, token in enumerate(row) if token >= 0]
        ids = [row[slot] for slot in real]
        place = locate(self.tokenizer, ids, self.text)
        if place is None:
            read = _decode(self.tokenizer, ids)
            shown = read if len(read) <= SHOWN else f"…{read[-SHOWN:]}"
            of = f" of sample {sample} (of {samples})" if samples > 1 else ""
            raise EditError(
                f"The text {self.text!r} does not occur in the prompt{of}, which reads {shown!r} "
                "to this tokenizer."
            )
        return real[place[0]], real[place[1] - 1] + 1
