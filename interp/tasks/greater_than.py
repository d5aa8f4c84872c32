"""Greater-than (Hanna et al. 2023, arXiv 2305.00586)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.errors import InputError
from interp.inputs import lexicon
from interp.inputs.tokenizer import Text
from interp.tasks.task import Instance, Problem, Task, choose


@dataclass(frozen=True)
class GreaterThan(Task):
    """ "The war lasted from the year 1732 to the year 17" → a two-digit year above 32.

    The metric is p(later years) − p(earlier or equal years). The corrupted prompt starts in the
    year XX01. Where a tokenizer writes years digit by digit, only the tens digit is judged (equal
    tens are left out).

    Misleads:
        Its metric is a difference of probabilities, so effects are on another scale than those of
        tasks with a margin of logits. Where years are written digit by digit only the tens digit is
        judged.
    """

    name = "greater_than"
    summary = "end year after the start year"
    citation = "Hanna et al. 2023, arXiv 2305.00586"
    judge = "mass"
    formats = ("bare", "few-shot")

    def compose(self, text: Text, rng: np.random.Generator) -> Problem:
        noun = choose(rng, text.pool(lexicon.EVENTS), 1)[0]
        century, start = int(rng.integers(12, 20)), int(rng.integers(2, 98))
        end = int(rng.integers(start + 1, 100))
        prompt = "The {} lasted from the year {}{:02d} to the year {}"
        return Problem(
            clean=prompt.format(noun, century, start, century),
            corrupted=prompt.format(noun, century, 1, century),
            answer=f"{end:02d}",
            wrong=(),
            info=dict(century=century, start=start),
        )

    def instance(self, text: Text, rng: np.random.Generator) -> Instance:
        for _ in range(200):
            problem = self.compose(text, rng)
            century, start = problem.info["century"], problem.info["start"]
            wording = self.worded(text, problem, rng)
            ids, corrupted = wording.clean, wording.corrupted
            prefix = text.encode(f" {century}")
            follow: dict[int, set[bool]] = {}
            for year in range(100):
                full = text.encode(f" {century}{year:02d}")
                if full[: len(prefix)] == prefix and len(full) > len(prefix):
                    follow.setdefault(full[len(prefix)], set()).add(year > start)
            later = tuple(t for t, above in follow.items() if above == {True})
            earlier = tuple(t for t, above in follow.items() if above == {False})
            if later and earlier and len(ids) == len(corrupted):
                return Instance(
                    tuple(ids),
                    (len(ids) - 1,),
                    (later,),
                    (earlier,),
                    tuple(corrupted),
                    problem.info,
                )
        raise InputError(
            "This tokenizer does not split years after the century, so greater_than cannot be "
            "posed."
        )
