"""Prompts that show solved pairs of a relation, and ask for one more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from interp.inputs.tokenizer import Text


class Shown(NamedTuple):
    """A prompt of solved pairs and one to solve, the same with the pairs' outputs dealt out anew,
    and the answer, as token ids."""

    ids: list[int]
    shuffled: list[int]
    answer: list[int]


def shown_pairs(
    text: Text,
    pairs: Sequence[tuple[str, str]],
    index: int,
    shots: int,
    rng: np.random.Generator,
    chat: bool = False,
) -> Shown:
    """Pair `index` asked after `shots` others, none with its input.

    Example:
        >>> from interp.inputs.shown import shown_pairs
        >>> pairs = [(str(i), str(i + 1)) for i in range(5)]
        >>> from interp.inputs.tokenizer import Text
        >>> text = Text(model.tokenizer)
        >>> prompt = shown_pairs(text, pairs, 0, 3, np.random.default_rng(0))
        >>> len(prompt.ids) == len(prompt.shuffled)
        True
    """
    same, reply = pairs[index]
    pool = [pair for pair in pairs if pair[0] != same]
    shown = [pool[i] for i in rng.permutation(len(pool))[:shots]]
    inputs = [text.encode(f" {one}\nA:") for one, _ in shown]
    outputs = [text.encode(f" {other}\n\nQ:") for _, other in shown]
    before, after = text.around_user() if chat else ("", "")
    head = text.plain(f"{before}Q:") if chat else text.prompt("Q:")
    tail = [*text.encode(f" {same}\nA:"), *(text.encode(after) if after else [])]

    def prompt(outputs: list[list[int]]) -> list[int]:
        both = zip(inputs, outputs, strict=True)
        return [*head, *(t for question, answer in both for t in question + answer), *tail]

    answer = text.encode(reply if after else f" {reply}")
    return Shown(prompt(outputs), prompt(outputs[1:] + outputs[:1]), answer)
