"""A relation learned in context: a file of `{"input", "output"}` pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.errors import InputError
from interp.inputs.shown import shown_pairs
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
