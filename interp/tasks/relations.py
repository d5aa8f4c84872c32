"""A relation learned in context: a file of `{"input", "output"}` pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        same = asked["input"]
        pool = [r for r in self.rows if r["input"] != same]
        shown = [pool[i] for i in rng.permutation(len(pool))[: self.shots]]
        inputs = [text.encode(f" {r['input']}\nA:") for r in shown]
        outputs = [text.encode(f" {r['output']}\n\nQ:") for r in shown]
        before, after = text.around_user() if self.format == "chat" else ("", "")
        head = text.plain(f"{before}Q:") if self.format == "chat" else text.prompt("Q:")
        tail = [*text.encode(f" {same}\nA:"), *(text.encode(after) if after else [])]
        answer = text.encode(asked["output"] if after else f" {asked['output']}")

        def prompt(outputs: list[list[int]]) -> list[int]:
            pairs = zip(inputs, outputs, strict=True)
            return [*head, *(t for question, reply in pairs for t in question + reply), *tail]

        ids, corrupted = prompt(outputs), prompt(outputs[1:] + outputs[:1])
        first = len(ids) - 1
        return Instance(
            (*ids, *answer[:-1]),
            tuple(range(first, first + len(answer))),
            tuple((t,) for t in answer),
            tuple(() for _ in answer),
            (*corrupted, *answer[:-1]),
            dict(input=same, output=asked["output"]),
        )
