"""Where tokens spell something: the tokens of each match of a pattern in what they decode to."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any
from unicodedata import east_asian_width


def places(tokenizer: Any, ids: Sequence[int], pattern: str) -> list[tuple[int, int]]:
    """(start, stop) of the tokens that each match of `pattern` overlaps, in order.

    Found by the characters that prefixes of the tokens decode to, so that a match may begin and end
    within tokens (" table" is one). A binary search: a few decodings a match, not one a token.

    Args:
        tokenizer: what decodes them.
        ids: token ids.
        pattern: a regular expression, as `whole_word` makes them; capitals don't matter.

    Example:
        >>> ids = model.tokenizer.encode("the cat and the hat", add_special_tokens=False)
        >>> places(model.tokenizer, ids, whole_word("cat"))
        [(1, 2)]
    """
    whole = _decode(tokenizer, ids)

    def reach(i: int) -> int:
        """How many characters of the whole the first i tokens spell."""
        part = _decode(tokenizer, ids[:i])
        if whole.startswith(part):
            return len(part)
        return next(
            (n for n, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(whole)
        )

    n = len(ids)
    found = []
    for match in re.finditer(pattern, whole, re.IGNORECASE):
        start = bisect_right(range(n + 1), match.start(), key=reach) - 1
        stop = bisect_left(range(n + 1), match.end(), key=reach)
        if 0 <= start < stop <= n:
            found.append((start, stop))
    return found


def whole_word(word: str) -> str:
    """A pattern for a word, or several in a row, that is no part of a longer one. Scripts that put
    no spaces between words have no such ends.

    Example:
        >>> import re
        >>> re.findall(whole_word("cat"), "scatter, a cat")
        ['cat']
    """
    inner = r"\s+".join(map(re.escape, word.split()))
    before = r"(?<!\w)" if _has_ends(word.strip()[0]) else ""
    after = r"(?!\w)" if _has_ends(word.strip()[-1]) else ""
    return before + inner + after


def _has_ends(letter: str) -> bool:
    return bool(re.match(r"\w", letter)) and east_asian_width(letter) not in "WF"


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
