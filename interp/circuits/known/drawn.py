"""Tasks of constructed models: prompts over a small vocabulary of their own, answered by a program
in Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from interp.circuits.known.high_level import Program
from interp.errors import InputError
from interp.inputs.tokenizer import Text
from interp.tasks.task import Instance, Task

#: of one judged position: the right token, the wrong ones
Answer = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class DrawnTask(Task, ABC):
    """Prompts that are drawn token by token, for the model that was made for them.

    Corrupted: another prompt of the same form, with another answer.
    """

    words: ClassVar[tuple[str, ...]]
    citation: ClassVar[str] = ""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> list[int]:
        """The ids of one prompt; all prompts have one length."""

    @abstractmethod
    def solve(self, ids: list[int]) -> dict[int, Answer]:
        """Judged position → the right token after it, and the wrong ones."""

    def corrupt(self, ids: list[int], rng: np.random.Generator) -> list[int]:
        """A prompt with another answer."""
        own = _right(self.solve(ids))
        while _right(self.solve(other := self.draw(rng))) == own:
            pass
        return other

    def instance(self, text: Text, rng: np.random.Generator) -> Instance:
        vocabulary = text.tokenizer.get_vocab()
        if any(vocabulary.get(word) != i for i, word in enumerate(self.words)):
            raise InputError(
                f"The task {self.name} is in the words of the model made for it; take both from "
                f"interp.circuits.constructed.get({self.name!r})."
            )
        ids = self.draw(rng)
        answers = self.solve(ids)
        return Instance(
            ids=tuple(ids),
            positions=tuple(answers),
            accept=tuple((right,) for right, _ in answers.values()),
            wrong=tuple(wrong for _, wrong in answers.values()),
            corrupted=tuple(self.corrupt(ids, rng)),
        )


def _right(answers: dict[int, Answer]) -> list[int]:
    return [right for right, _ in answers.values()]


@dataclass(frozen=True)
class ProgramTask(DrawnTask):
    """The prompts of a program with named variables, judged at the last position."""

    program: ClassVar[Program]

    def draw(self, rng: np.random.Generator) -> list[int]:
        ids: list[int] = self.program.asked(1, rng)[0].tolist()
        return ids

    def solve(self, ids: list[int]) -> dict[int, Answer]:
        row = np.array([ids])
        right = int(self.program.values(row)["answer"][0].argmax())
        wrong = np.flatnonzero(self.program.rivals(row)[0]).tolist()
        return {len(ids) - 1: (right, tuple(wrong))}

    def corrupt(self, ids: list[int], rng: np.random.Generator) -> list[int]:
        other: list[int] = self.program.corrupted(np.array([ids]), rng)[0].tolist()
        return other
