"""Bigram-Backcopy on words (Guo et al. 2024, arXiv 2410.13835)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.inputs import lexicon
from interp.inputs.language import _bigrams
from interp.inputs.tokenizer import Text
from interp.tasks.task import Instance, Task, choose


@dataclass(frozen=True)
class BigramBackcopy(Task):
    """A Markov chain over words in which a trigger word is followed by the word before it.

    x_{t+1} = x_{t−1} if x_t is a trigger, else drawn from P(· | x_t), a fixed bigram table. Judged
    at every trigger of the second half, so that a model without prior knowledge can infer the rule
    from the first half. Corrupted: the words before judged triggers are replaced.

    Misleads:
        It was made for small models trained on it. Others have to infer the rule from the prompt,
        and a low accuracy says that they did not, not that heads sleep.
    """

    length: int = 96
    rate: float = 0.15

    name = "bigram_backcopy"
    summary = "after a trigger word, repeat the word before it"
    citation = "Guo et al. 2024, arXiv 2410.13835"

    def words(self, text: Text, rng: np.random.Generator, length: int) -> list[str]:
        nouns, triggers = text.pool(lexicon.NOUNS, 12), text.pool(lexicon.TRIGGERS, 1)
        table = _bigrams(tuple(nouns), tuple(nouns), 7)
        out = choose(rng, nouns, 1)
        while len(out) < length:
            if len(out) >= 2 and out[-1] in triggers:
                out.append(out[-2])
            elif len(out) >= 2 and out[-1] != out[-2] and rng.random() < self.rate:
                out.append(triggers[int(rng.integers(len(triggers)))])
            else:
                successors = table[out[-1]]
                out.append(successors[int(rng.integers(len(successors)))])
        return out

    def document(self, text: Text, rng: np.random.Generator) -> str:
        return "Chain: " + " ".join(self.words(text, rng, int(rng.integers(16, 48)))) + "."

    def instance(self, text: Text, rng: np.random.Generator) -> Instance:
        nouns = text.pool(lexicon.NOUNS, 12)
        triggers = set(text.pool(lexicon.TRIGGERS, 1))
        while True:
            words = self.words(text, rng, self.length)
            judged = [t for t in range(self.length // 2, self.length - 1) if words[t] in triggers]
            if judged:
                break
        lead = text.prompt("Chain:")
        ids = lead + [text.one(w) for w in words]
        other = list(ids)
        for t in judged:
            other[len(lead) + t - 1] = text.one(
                choose(rng, [n for n in nouns if n != words[t - 1]], 1)[0]
            )
        return Instance(
            tuple(ids),
            tuple(len(lead) + t for t in judged),
            tuple((text.one(words[t + 1]),) for t in judged),
            tuple(() for _ in judged),
            tuple(other),
            dict(words=words),
        )
