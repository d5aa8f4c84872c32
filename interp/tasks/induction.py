"""Induction: a random token sequence, repeated (Olsson et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.errors import InputError
from interp.inputs.tokenizer import Text
from interp.tasks.task import Instance, Task


@dataclass(frozen=True)
class Induction(Task):
    """BOS, then `length` distinct random tokens twice; the second copy is to be predicted.

    Judged at every position of the second copy but the first. `info["repeat"]` is the length,
    `info["start"]` the index of the first random token. Corrupted: the first copy is replaced by
    other tokens.

    Misleads:
        Random tokens are no text: a model that continues them need not do so for patterns of words,
        and the reverse.
    """

    length: int = 50

    name = "induction"
    summary = "repeat a sequence of random tokens"
    citation = "Olsson et al. 2022, arXiv 2209.11895"

    def instance(self, text: Text, rng: np.random.Generator) -> Instance:
        vocabulary = text.vocabulary()
        if len(vocabulary) <= self.length:
            raise InputError(
                f"The task induction needs more than {self.length} different tokens and this "
                "tokenizer has "
                f"{len(vocabulary)}; choose another task."
            )
        if len(vocabulary) >= 2 * self.length:
            tokens = rng.choice(vocabulary, 2 * self.length, replace=False)
        else:  # too few for two distinct sequences: the first one must be
            tokens = rng.choice(vocabulary, self.length, replace=False)
            tokens = np.concatenate(
                [tokens, rng.choice(np.setdiff1d(vocabulary, tokens), self.length)]
            )
        first, other, bos = tokens[: self.length].tolist(), tokens[self.length :].tolist(), text.bos
        start = len(bos)
        ids = bos + first + first
        positions = tuple(range(start + self.length, start + 2 * self.length - 1))
        return Instance(
            tuple(ids),
            positions,
            tuple((ids[p + 1],) for p in positions),
            tuple(() for _ in positions),
            tuple(bos + other + first),
            dict(repeat=self.length, start=start),
        )
