"""A task of one's own, made of the rows of a file."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from interp.errors import InputError
from interp.inputs.tokenizer import Text
from interp.tasks.rows import read_rows
from interp.tasks.task import Instance, Task


@dataclass(frozen=True)
class FileTask(Task):
    """Problems of a file's rows, in an order drawn by the seed, none twice: the base class.

    Subclasses set `columns` and `rows_are`, and write `problem`. The task is called as the file.
    """

    path: str

    #: what every row must have
    columns: ClassVar[tuple[str, ...]]
    #: what the rows are called in a sentence
    rows_are: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", Path(self.path).stem)
        super().__post_init__()

    @property
    def source(self) -> str:
        return self.path

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The file's rows. Raises `InputError` for a file that can't be read or used."""
        rows = read_rows(self.path, self.columns)
        self.check(rows)
        return rows

    def check(self, rows: list[dict[str, Any]]) -> None:
        """Raise `InputError` for rows that no problem can be made of."""

    @abstractmethod
    def problem(self, text: Text, index: int, rng: np.random.Generator) -> Instance:
        """The problem that asks for row `index`; `rng` draws what stands around it."""

    def sample(self, tokenizer: Any, n: int, seed: int = 0) -> list[Instance]:
        if n > len(self.rows):
            raise InputError(
                f"{self.path} has {len(self.rows)} {self.rows_are} and {n} were asked for."
            )
        text = Text(tokenizer)
        order = np.random.default_rng(seed).permutation(len(self.rows))
        return [
            self.problem(text, int(i), np.random.default_rng([seed, int(i)])) for i in order[:n]
        ]

    def instance(self, text: Text, rng: np.random.Generator) -> Instance:
        return self.problem(text, int(rng.integers(len(self.rows))), rng)
