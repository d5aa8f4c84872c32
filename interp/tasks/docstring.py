"""Docstring arguments (Heimersheim and Janiak 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.inputs import lexicon
from interp.inputs.tokenizer import Text
from interp.tasks.task import Problem, Task, choose


def _prompt(function: str, arguments: list[str], documented: list[str], words: list[str]) -> str:
    lines = "".join(
        f"\n :param {a}: {words[2 * i]} {words[2 * i + 1]}" for i, a in enumerate(documented)
    )
    return (
        f"def {function}(self, {', '.join(arguments)}):\n doc {words[-2]} {words[-1]}{lines}\n "
        ":param"
    )


@dataclass(frozen=True)
class Docstring(Task):
    """The next argument of a Python docstring: after ``:param`` lines for the arguments so far,
    name the next.

    Corrupted: the argument names in the signature are replaced by random ones, so nothing says
    which comes next.

    Misleads:
        Two ways lead to the answer, the next name in order and a name that is not documented yet;
        only some of the wrong names tell them apart.
    """

    name = "docstring"
    summary = "next argument name in a docstring"
    citation = (
        "Heimersheim and Janiak 2023, 'A circuit for Python docstrings in a 4-layer "
        "attention-only transformer'"
    )
    formats = ("bare", "few-shot", "chat")

    def compose(self, text: Text, rng: np.random.Generator) -> Problem:
        pool = text.pool(lexicon.ARGUMENTS, 16)
        picked = choose(rng, pool, 15)
        arguments, others, nouns = (
            picked[:6],
            picked[6:11],
            choose(rng, text.pool(lexicon.NOUNS), 6),
        )
        function = choose(rng, text.pool(lexicon.FUNCTIONS), 1)[0]
        documented = arguments[
            2:4
        ]  # self, two undocumented ones, two documented, then the answer and one more
        corrupted_arguments = [*others, picked[11]]
        return Problem(
            clean=_prompt(function, arguments, documented, nouns),
            corrupted=_prompt(function, corrupted_arguments, documented, nouns),
            answer=f" {arguments[4]}",
            wrong=tuple(f" {a}" for i, a in enumerate(arguments) if i != 4),
            info=dict(arguments=arguments),
        )
