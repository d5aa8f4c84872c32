"""Where the sentences of a tokenised text begin and end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from interp.inputs.pieces import pieces

#: an end of a sentence (with quotation marks or brackets behind it), or of a line with something on
#: it; an initial or a number in front of the full stop ends none
_END = re.compile(r"(?:(?<!\b[A-Z])[.!?…]+[\"'”’)\]]*(?=\s)|\S(?=\s*\n)|[。！？]+)")


def sentences(tokenizer: Any, ids: Sequence[int], least: int = 1) -> list[tuple[int, int]]:
    """Token ranges [start, stop) of the sentences of a text, in order, all tokens in one of them.

    A sentence ends with a full stop, question or exclamation mark before a blank, or with its line;
    blanks belong to what comes after them. One of fewer than `least` tokens is part of the next,
    or at the end of the one before.

    Example:
        >>> from interp.inputs.sentences import sentences
        >>> ids = model.tokenizer.encode("the cat saw the dog . the dog saw the cat .")
        >>> [stop - start for start, stop in sentences(model.tokenizer, ids)]
        [8, 7]
    """
    parts = pieces(tokenizer, ids)
    text = "".join(parts)
    ends = {match.end() for match in _END.finditer(text)}
    found, start, at = [], 0, 0
    for token, part in enumerate(parts):
        ended = any(at < end <= at + len(part) for end in ends)
        at += len(part)
        if ended and token + 1 - start >= least:
            found.append((start, token + 1))
            start = token + 1
    if start < len(parts) and found and len(parts) - start < least:
        found[-1] = (found[-1][0], len(parts))
    elif start < len(parts):
        found.append((start, len(parts)))
    return found
