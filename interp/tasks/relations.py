"""A relation learned in context: a file of `{"input", "output"}` pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from interp.errors import InputError
from interp.inputs.tokenizer import Text
from interp.tasks.file_task import FileTask
from interp.tasks.task import Instance


@dataclass(frozen=True)
class Relation(FileTask):
    """The output of one pair after `shots` others, "Q: input" and "A: output" (Todd et al.).

    Judged "exact": every token of the output. The corrupted prompt has the shots' outputs dealt
    out anew, none with its own input, so that they show no relation. The format "chat" is a user's
    turn with the same pairs.

    Args:
        path: a JSON list or JSON Lines of {"input": …, "output": …}.
        shots: pairs shown.
        format: as in `Task`.

    Example:
        >>> from pathlib import Path
        >>> pairs = [f'{{"input": "{i}", "output": "{i + 1}"}}' for i in range(20)]
        >>> _ = Path("next.jsonl").write_text("\\n".join(pairs))
        >>> interp.tasks.get("next.jsonl").shots
        10
    """

    shots: int = 10

    name = "relation"
    summary = "a relation of one's own, learned in context"
    citation = "Todd et al. 2024 (ICLR), arXiv 2310.15213"
    judge = "exact"
    columns = ("input", "output")
    rows_are = "pairs"
    formats = ("bare", "chat")

    def check(self, rows: list[dict[str, Any]]) -> None:
        if len(rows) <= self.shots:
            raise InputError(
                f"{self.path} has {len(rows)} pairs, and {self.shots} are shown before the one "
                "that is asked; give more, or fewer shots."
            )

    def problem(self, text: Text, index: int, rng: np.random.Generator) -> Instance:
        asked = self.rows[index]
        pairs = [(r["input"], r["output"]) for r in self.rows]
        shown = shown_pairs(text, pairs, index, self.shots, rng, chat=self.format == "chat")
        first, answer = len(shown.ids) - 1, shown.answer
        return Instance(
            (*shown.ids, *answer[:-1]),
            tuple(range(first, first + len(answer))),
            tuple((t,) for t in answer),
            tuple(() for _ in answer),
            (*shown.shuffled, *answer[:-1]),
            dict(input=asked["input"], output=asked["output"]),
        )


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
        >>> from interp.tasks.relations import shown_pairs
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
