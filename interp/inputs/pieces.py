"""Tokens as pieces of text that, joined, are the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: what stands for the rest of a character whose first bytes another token holds
REST = ""
BROKEN = "\ufffd"


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token's part of the text, special tokens by their names.

    Joined they are what the tokenizer decodes, blanks included, for byte-level, SentencePiece,
    WordPiece and word-level vocabularies. A character over several tokens stands whole in the first
    of them, and the others are empty. Without a tokenizer, the ids as numbers.

    Example:
        >>> from interp.inputs.pieces import pieces
        >>> pieces(model.tokenizer, model.tokenizer.encode("the cat", add_special_tokens=False))
        [' the', ' cat']
    """
    if tokenizer is None:
        return [f" {i}" for i in ids]
    ids = [int(i) for i in ids]
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(ids)]
    options = dict(skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if any(name.startswith("\u2581") for name in names):  # SentencePiece's blank
        return _whole(
            tokenizer,
            ids,
            [_sentence_piece(tokenizer, i, n) for i, n in zip(ids, names, strict=True)],
        )
    plain = [str(tokenizer.decode([i], **options)) for i in ids]
    if any(name.startswith("##") for name in names):  # WordPiece
        glued = [
            n[2:] if n.startswith("##") else f" {p}" for n, p in zip(names, plain, strict=True)
        ]
        return [glued[0].lstrip(), *glued[1:]]
    whole = str(tokenizer.decode(ids, **options))
    spaced = [p if k == 0 or p.isspace() else f" {p}" for k, p in enumerate(plain)]
    if "".join(plain) != whole and "".join(spaced) == whole:  # words, joined by blanks
        return spaced
    return _whole(tokenizer, ids, plain)


def _sentence_piece(tokenizer: Any, token: int, name: str) -> str:
    if name.startswith("<0x") and name.endswith(">"):  # a byte
        return str(tokenizer.decode([token]))
    return name.replace("\u2581", " ")


def _whole(tokenizer: Any, ids: list[int], parts: list[str]) -> list[str]:
    """The parts, with characters that are spread over tokens put together in the first of them."""
    found = list(parts)
    k = 0
    while k < len(ids):
        if BROKEN not in found[k]:
            k += 1
            continue
        for stop in range(k + 2, min(k + 8, len(ids)) + 1):
            text = str(tokenizer.decode(ids[k:stop], clean_up_tokenization_spaces=False))
            if BROKEN not in text:
                found[k:stop] = [text, *[REST] * (stop - k - 1)]
                k = stop
                break
        else:
            k += 1
    return found
