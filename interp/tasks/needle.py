"""A needle: one fact, the question that asks for it, and the beginning of an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from interp.errors import InputError
from interp.inputs import lexicon
from interp.inputs.tokenizer import Text

#: where a fact without a bar is cut: what stands before is asked for what stands behind
VERBS = re.compile(r"\s(is|are|was|were)\s")


@dataclass(frozen=True)
class Needle:
    """A fact as text: `lead` and `answer` are its sentence, without a full stop.

    Example:
        >>> from interp.tasks.needle import Needle
        >>> Needle.of("The best thing to eat in Rome is soup.").question
        'What is the best thing to eat in Rome?'
    """

    lead: str
    answer: str
    question: str

    @classmethod
    def of(cls, fact: str, question: str | None = None) -> Needle:
        """One's own fact: cut at " | ", else after its first is, are, was or were.

        Raises `InputError` where it can't be cut, or no question can be made of it.
        """
        sentence = fact.strip().rstrip(".")
        lead, bar, answer = sentence.partition("|")
        found = VERBS.search(lead if bar else sentence)
        if not bar and found:
            lead, answer = sentence[: found.end()], sentence[found.end() :]
        lead, answer = lead.strip(), answer.strip()
        if not lead or not answer:
            raise InputError(
                'A needle is a sentence that says what something is, as "The best thing to eat in '
                'Rome is soup."; or mark where its answer begins with a bar: "Rome eats | soup".'
            )
        if question is None:
            if not found or lead[found.end() :].strip():
                raise InputError(
                    f"No question can be made of the needle {fact!r}; give the one that asks for "
                    "it with --question (question=)."
                )
            subject = lead[: found.start()].strip()
            question = f"What {found.group(1)} {subject[:1].lower()}{subject[1:]}?"
        return cls(lead, answer, question.strip())

    @classmethod
    def drawn(cls, text: Text, rng: np.random.Generator, words: int) -> tuple[Needle, str]:
        """A secret of a city, of `words` single-token words, and another such answer."""
        fact = _one(rng, text.pool(lexicon.FACTS))
        city = _one(rng, text.pool(lexicon.CITIES))
        nouns = text.pool(lexicon.NOUNS, 2 * words)
        drawn = [nouns[i] for i in rng.choice(len(nouns), 2 * words, replace=False)]
        needle = cls(
            f"The secret {fact} of {city} is",
            " ".join(drawn[:words]),
            f"What is the secret {fact} of {city}?",
        )
        return needle, " ".join(drawn[words:])

    @property
    def sentence(self) -> str:
        """The whole fact."""
        return f"{self.lead} {self.answer}."


def _one(rng: np.random.Generator, words: list[str]) -> str:
    return words[int(rng.choice(len(words), 1, replace=False)[0])]


def recall(said: str, wanted: str) -> float:
    """ROUGE-1 recall: the share of the wanted words that were said, each as often as it was
    (letters and digits, without case; no stemming).

    Example:
        >>> from interp.tasks.needle import recall
        >>> recall("Eat soup, they say", "eat the soup")
        0.6666666666666666
    """
    heard, want = (re.findall(r"[a-z0-9]+", s.lower()) for s in (said, wanted))
    if not want:
        return 0.0
    return sum(min(heard.count(w), want.count(w)) for w in set(want)) / len(want)
