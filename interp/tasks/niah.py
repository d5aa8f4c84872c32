"""Needle in a haystack: a fact hidden in long text, asked for at the end (Wu et al. 2024, arXiv
2404.15574)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError
from interp.inputs import english, language, lexicon
from interp.inputs.text import content
from interp.inputs.tokenizer import Text
from interp.tasks.needle import Needle, recall
from interp.tasks.task import Instance, Task, choose
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from interp.tasks.metric import Judge

#: solved examples of the format few-shot
EXAMPLES = 3
#: tokens of an answer that is given freely, as in the paper's code
FREE = 50
#: the paper counts an answer as right from this ROUGE-1 recall of the needle on
ENOUGH = 0.5
#: words of an answer in the format paper: with fewer, the question alone holds half of the needle,
#: and any echo of it would pass
LONG = 8
#: tokens of the problems that formats are tried on
BRIEF = 256


@dataclass(frozen=True)
class NeedleInAHaystack(Task):
    """ "… The secret code of Paris is w1 w2 w3 w4. … Question: What is the secret code of Paris?
    Answer:" → w1 … w4.

    The format "lead" ends in "Answer: The secret code of Paris is", "few-shot" begins with solved
    examples, "chat" asks in the tokenizer's template and begins the answer. They are judged
    "exact": every answer token. "paper" is Wu et al.'s: the book and the question as they put them,
    the whole sentence as the needle (with an answer of at least 8 words, so that an echo of the
    question does not pass), at most 50 greedy tokens, right where their ROUGE-1 recall of the
    needle exceeds one half ("recall").

    Args:
        lengths: prompt-plus-answer lengths in tokens; instance i takes the i-th, in turn.
        depths: relative positions of the needle (0 start, 1 end), in turn within each length.
        words: words of the answer.
        haystack: a text to use, or a `Path` to one, instead of the natural English (generated prose
            for tokenizers that don't know it); split at sentence ends.
        needle: a fact of one's own, "The … is …" or "lead | answer", in every haystack.
        question: what asks for it; made of the needle if not given.
        format: as in `Task`.

    `info`: `needle` (start, end) token span of the answer words inside the haystack (of the whole
    sentence in the format paper), `question` (start, end) span of the question, `length`, `depth`.
    Corrupted: another needle's words.

    Misleads:
        Whether a small model answers depends on how it is asked: SmolLM2 solves none of eight after
        "Answer:", seven where the answer's sentence is begun. What is solved is a literal copy, not
        the use of a long text.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    words: int = 4
    haystack: str | os.PathLike[str] | None = None
    needle: str | None = None
    question: str | None = None

    name = "niah"
    summary = "needle in a haystack: recall a fact from long text"
    citation = "Wu et al. 2024, arXiv 2404.15574; Kamradt 2023"
    formats = ("bare", "lead", "few-shot", "chat", "paper")

    @property
    def judge(self) -> Judge:  # type: ignore[override]
        """How an answer is judged: "exact", or "recall" in the format paper."""
        return "recall" if self.format == "paper" else "exact"

    def at(self, context: int) -> NeedleInAHaystack:
        """This task with all lengths at most `context`: a quarter, a half and the whole of it."""
        least = min(context, 96 if self.format in ("bare", "lead") else 160)
        lengths = {max(least, context // 4), max(least, context // 2), context}
        return replace(self, lengths=tuple(sorted(lengths)))

    def exactly(self, context: int) -> NeedleInAHaystack:
        """This task with every length `context`."""
        return replace(self, lengths=(context,))

    def brief(self) -> NeedleInAHaystack:
        """This task at one short length."""
        return self.exactly(min(BRIEF, max(self.lengths)))

    def sample(self, tokenizer: Any, n: int, seed: int = 0) -> list[Instance]:
        text = Text(tokenizer)
        cells = [(length, depth) for depth in self.depths for length in self.lengths]
        return [
            self._build(text, np.random.default_rng([seed, i]), *cells[i % len(cells)])
            for i in range(n)
        ]

    def instance(self, text: Text, rng: np.random.Generator) -> Instance:
        length = self.lengths[int(rng.integers(len(self.lengths)))]
        return self._build(text, rng, length, self.depths[int(rng.integers(len(self.depths)))])

    def _sentences(self, text: Text, rng: np.random.Generator, tokens: int) -> list[str]:
        """At least `tokens` tokens of sentences."""
        if self.haystack is not None:
            sentences = english.sentences(content(self.haystack, "haystack"))
            if len(sentences) < 8:
                raise InputError(
                    f"The haystack {quoted(self.haystack)} has fewer than 8 sentences; give a "
                    "longer text."
                )
            start = int(rng.integers(len(sentences)))
            need = tokens + 8
            return [sentences[(start + i) % len(sentences)] for i in range(need)]
        if not text.natural:
            return language.prose(rng, tokens // 4 + 8)
        return [s for passage in english.shuffled(rng) for s in english.sentences(passage)]

    def _drawn(self, text: Text, rng: np.random.Generator) -> tuple[Needle, str]:
        """The needle, and another answer of as many tokens."""
        if self.needle is None:
            free = self.format == "paper"
            return Needle.drawn(text, rng, max(self.words, LONG) if free else self.words)
        needle = Needle.of(self.needle, self.question)
        if self.format == "paper" and recall(needle.question, needle.sentence) > ENOUGH:
            raise InputError(
                "More than half of this needle's words are in its question, so that any echo of it "
                "would count as found; give a needle with a longer answer."
            )
        nouns = text.pool(lexicon.NOUNS, 2)
        return needle, " ".join(
            nouns[int(rng.integers(len(nouns)))] for _ in text.encode(f" {needle.answer}")
        )

    def _around(
        self, text: Text, needle: Needle, rng: np.random.Generator
    ) -> tuple[list[int], list[int], list[int]]:
        """(what stands before the haystack, the question, what begins the answer), token ids."""
        question, lead = f" Question: {needle.question}", f" {needle.lead}"
        if self.format == "bare":
            return text.bos, text.encode(question), text.encode(" Answer:")
        if self.format == "lead":
            return text.bos, text.encode(question), text.encode(f" Answer:{lead}")
        if self.format == "few-shot":
            # a generator of its own: the problem is the same in every format
            own = np.random.default_rng(rng.bit_generator.seed_seq.spawn(1)[0])  # type: ignore[attr-defined]
            shown = [Needle.drawn(text, own, self.words)[0] for _ in range(EXAMPLES)]
            solved = "".join(
                f"{s.sentence} Question: {s.question} Answer: {s.answer}.\n\n" for s in shown
            )
            return text.prompt(solved), text.encode(question), text.encode(" Answer:")
        if self.format == "chat":
            before, after = text.around_user()
            asked = text.encode(f"\n\n{needle.question}")
            return text.plain(before), asked, text.encode(after + needle.lead)
        asked = text.encode(f"\nBased on the content of the book, Question: {needle.question}")
        if not text.has_chat:
            return text.bos, asked, text.encode("\nAnswer:")
        before, after = text.around_user()
        closed = text.encode("\n</book>")
        return text.plain(f"{before}<book>"), closed + asked, text.encode(f"\nAnswer:{after}")

    def _build(self, text: Text, rng: np.random.Generator, length: int, depth: float) -> Instance:
        needle, other = self._drawn(text, rng)
        lead = text.encode(f" {needle.lead}")
        answer, changed = text.encode(f" {needle.answer}"), text.encode(f" {other}")
        if len(answer) != len(changed):
            changed = (changed * len(answer))[: len(answer)]
        # as it stands after a word: alone, "." may get a space before it
        stop = text.encode(f" {needle.answer}.")[len(answer) :]
        head, question, ask = self._around(text, needle, rng)
        fixed = sum(map(len, (head, lead, answer, stop, question, ask, answer)))
        room = length - fixed
        if room < 0:
            raise InputError(
                f"A needle with its question takes {fixed} tokens, more than the {length} asked "
                "for."
            )
        hay = self._hay(text, rng, room)
        cut = round(depth * len(hay))
        before = head + [t for s in hay[:cut] for t in s]
        after = [t for s in hay[cut:] for t in s]
        start = len(before) + len(lead)
        tail = stop + after + question + ask
        ids = before + lead + answer + tail + answer[:-1]
        first = len(ids) - len(answer)  # index of the last prompt token
        q0 = first + 1 - len(ask) - len(question)
        span, free = (start, start + len(answer)), {}
        if self.format == "paper":
            span = (len(before), span[1] + len(stop))
            free = dict(steps=FREE, ends=_line_ends(text), wanted=needle.sentence)
        return Instance(
            tuple(ids),
            tuple(range(first, first + len(answer))),
            tuple((t,) for t in answer),
            tuple(() for _ in answer),
            tuple(before + lead + changed + tail + answer[:-1]),
            dict(
                needle=span,
                question=(q0, q0 + len(question)),
                length=len(ids) + 1,
                depth=depth,
                **free,
            ),
        )

    def _hay(self, text: Text, rng: np.random.Generator, room: int) -> list[list[int]]:
        """Whole sentences, token ids, as many as fit. Raises `InputError` where English runs
        out."""
        hay: list[list[int]] = []
        used = 0
        for s in self._sentences(text, rng, room):
            ids = text.encode(f" {s}")
            if used + len(ids) > room:
                return hay
            hay.append(ids)
            used += len(ids)
        raise InputError(
            f"The haystack ends after {used:,} tokens and {room:,} are needed; give a longer one "
            "with --haystack FILE (haystack=)."
        )

    def heard(self, tokenizer: Any, instance: Instance, said: Sequence[int]) -> tuple[float, float]:
        """(1 if more than half of the needle's words were said, else 0; recall − ½)."""
        words = tokenizer.decode(list(said), skip_special_tokens=True)
        share = recall(words, instance.info["wanted"])
        return float(share > ENOUGH), share - ENOUGH

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


def _line_ends(text: Text) -> tuple[int, ...]:
    """The token that a line break is, where it is one."""
    ids = text.encode("\n")
    return tuple(ids) if len(ids) == 1 else ()
