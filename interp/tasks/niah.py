"""Needle in a haystack: a fact hidden in long text, asked for at the end (Wu et al. 2024, arXiv
2404.15574)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from interp.errors import InputError
from interp.inputs import language, lexicon
from interp.inputs.tokenizer import Text
from interp.tasks.task import Instance, Task, choose


@dataclass(frozen=True)
class NeedleInAHaystack(Task):
    """ "… The secret code of Paris is w1 w2 w3 w4. … Question: What is the secret code of Paris?
    Answer:" → w1 … w4.

    Args:
        lengths: prompt-plus-answer lengths in tokens; instance i takes the i-th, in turn.
        depths: relative positions of the needle (0 start, 1 end), in turn within each length.
        words: words of the answer.
        haystack: a text file to use instead of the generated prose; split at sentence ends.

    `info`: `needle` (start, end) token span of the answer words inside the haystack, `question`
    (start, end) span of the question, `length`, `depth`. Judged "exact": every answer token.
    Corrupted: another needle's words.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    words: int = 4
    haystack: str | None = None

    name = "niah"
    summary = "needle in a haystack: recall a fact from long text"
    citation = "Wu et al. 2024, arXiv 2404.15574; Kamradt 2023"
    judge = "exact"

    def at(self, context: int) -> NeedleInAHaystack:
        """This task with all lengths at most `context`: a quarter, a half and the whole of it."""
        lengths = tuple(sorted({max(96, context // 4), max(96, context // 2), context}))
        return NeedleInAHaystack(lengths, self.depths, self.words, self.haystack)

    def exactly(self, context: int) -> NeedleInAHaystack:
        """This task with every length `context`."""
        return NeedleInAHaystack((context,), self.depths, self.words, self.haystack)

    def sample(self, tokenizer, n: int, seed: int = 0) -> list[Instance]:
        text = Text(tokenizer)
        cells = [(length, depth) for depth in self.depths for length in self.lengths]
        return [
            self._build(text, np.random.default_rng([seed, i]), *cells[i % len(cells)])
            for i in range(n)
        ]

    def instance(self, text: Text, rng: np.random.Generator) -> Instance:
        length = self.lengths[int(rng.integers(len(self.lengths)))]
        return self._build(text, rng, length, self.depths[int(rng.integers(len(self.depths)))])

    def _sentences(self, rng: np.random.Generator, tokens: int) -> list[str]:
        if self.haystack is None:
            return language.prose(rng, tokens // 4 + 8)
        path = Path(self.haystack)
        if not path.is_file():
            raise InputError(f"There is no haystack file {path}; give a plain text file.")
        sentences = [
            s.strip()
            for s in re.split(r"(?<=[.!?])\s+", path.read_text(encoding="utf-8"))
            if s.strip()
        ]
        if len(sentences) < 8:
            raise InputError(
                f"The haystack file {path} has fewer than 8 sentences; give a longer text."
            )
        start = int(rng.integers(len(sentences)))
        need = tokens // 4 + 8
        return [sentences[(start + i) % len(sentences)] for i in range(need)]

    def _build(self, text: Text, rng: np.random.Generator, length: int, depth: float) -> Instance:
        fact, city = (
            choose(rng, text.pool(lexicon.FACTS), 1)[0],
            choose(rng, text.pool(lexicon.CITIES), 1)[0],
        )
        words = choose(rng, text.pool(lexicon.NOUNS, 2 * self.words), 2 * self.words)
        answer, other = words[: self.words], words[self.words :]
        lead = text.encode(f" The secret {fact} of {city} is")
        answer_ids = [text.one(w) for w in answer]
        stop = text.encode(f" {answer[-1]}.")[
            1:
        ]  # as it stands after a word: alone, "." may get a space before it
        question = text.encode(f" Question: What is the secret {fact} of {city}?")
        ask = text.encode(" Answer:")
        fixed = (
            len(text.bos)
            + len(lead)
            + len(answer)
            + len(stop)
            + len(question)
            + len(ask)
            + len(answer)
        )
        room = length - fixed
        if room < 0:
            raise InputError(
                f"A needle with its question takes {fixed} tokens, more than the {length} asked "
                "for."
            )
        hay: list[list[int]] = []
        used = 0
        for s in self._sentences(rng, room):
            ids = text.encode(" " + s)
            if used + len(ids) > room:
                break
            hay.append(ids)
            used += len(ids)
        cut = round(depth * len(hay))
        before = text.bos + [t for s in hay[:cut] for t in s]
        after = [t for s in hay[cut:] for t in s]
        start = len(before) + len(lead)
        tail = stop + after + question + ask
        ids = before + lead + answer_ids + tail + answer_ids[:-1]
        changed = before + lead + [text.one(w) for w in other] + tail + answer_ids[:-1]
        first = len(ids) - len(answer)  # index of the last prompt token
        q0 = first + 1 - len(ask) - len(question)
        return Instance(
            tuple(ids),
            tuple(range(first, first + len(answer))),
            tuple((t,) for t in answer_ids),
            tuple(() for _ in answer_ids),
            tuple(changed),
            dict(
                needle=(start, start + len(answer)),
                question=(q0, q0 + len(question)),
                length=len(ids) + 1,
                depth=depth,
            ),
        )

    def document(self, text: Text, rng: np.random.Generator) -> str:
        """Training text: a few facts in a little prose, then one or more asked again."""
        cities, nouns = text.pool(lexicon.CITIES), text.pool(lexicon.NOUNS)
        count = int(rng.integers(1, 4))
        facts = [
            (
                choose(rng, text.pool(lexicon.FACTS), 1)[0],
                city,
                " ".join(choose(rng, nouns, self.words)),
            )
            for city in choose(rng, cities, count)
        ]
        out = []
        for fact, city, words in facts:
            out += language.prose(rng, int(rng.integers(0, 2)))
            out.append(f"The secret {fact} of {city} is {words}.")
        out += language.prose(rng, int(rng.integers(0, 2)))
        for i in rng.permutation(count)[: int(rng.integers(1, count + 1))]:
            fact, city, words = facts[i]
            out.append(f"Question: What is the secret {fact} of {city}? Answer: {words}.")
        return " ".join(out)
