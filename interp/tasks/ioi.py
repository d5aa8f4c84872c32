"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.inputs import lexicon
from interp.inputs.tokenizer import Text
from interp.tasks.task import Problem, Task, choose, names

TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {gift} to",
    "Then, {A} and {B} had a long day at the {place}, and {S} gave a {gift} to",
    "After {A} and {B} went to the {place}, {S} gave a {gift} to",
    "While {A} and {B} were working at the {place}, {S} gave a {gift} to",
    "Then, {A} and {B} went to the {place}. {S} gave a {gift} to",
)


@dataclass(frozen=True)
class IndirectObject(Task):
    """ "When Mary and John went to the store, John gave a drink to" → " Mary", both orders of the
    names.

    corruption="distinct": the second subject becomes a third name (no indirect object is
    determined); "swap": the roles of the two names are exchanged, so the other name is right.

    Misleads:
        One family of sentences with two names: heads found on it are heads of this template. What
        the corrupted twin changes decides which of them count, so name the corruption.
    """

    corruption: str = "distinct"

    name = "ioi"
    summary = "indirect object: which of two names receives the gift"
    citation = "Wang et al. 2022, arXiv 2211.00593"
    formats = ("bare", "few-shot", "chat")

    def compose(self, text: Text, rng: np.random.Generator) -> Problem:
        io, subject, third = choose(rng, names(text), 3)
        pair = dict(A=io, B=subject) if rng.random() < 0.5 else dict(A=subject, B=io)
        fill = dict(
            pair,
            place=choose(rng, text.pool(lexicon.PLACES), 1)[0],
            gift=choose(rng, text.pool(lexicon.GIFTS), 1)[0],
        )
        template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
        return Problem(
            clean=template.format(S=subject, **fill),
            corrupted=template.format(S=third if self.corruption == "distinct" else io, **fill),
            answer=f" {io}",
            wrong=(f" {subject}",),
            info=dict(io=io, subject=subject, third=third),
        )
