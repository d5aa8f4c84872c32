"""Generated English-like prose: the default haystack, and the filler of the bundled model's
language.

Sentences follow one small grammar; which adjective goes with which noun, and so on, is a fixed
seeded bigram table (each word has a few favourite successors), so the text has bigram structure to
be learned and no facts.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from interp.inputs import lexicon

TABLE_SEED = 20240229
FAVOURITES = 6


@cache
def _bigrams(left: tuple[str, ...], right: tuple[str, ...], salt: int) -> dict[str, list[str]]:
    """Each word of `left` gets `FAVOURITES` successors from `right`, fixed for ever by the seed."""
    rng = np.random.default_rng(TABLE_SEED + salt)
    return {w: [right[i] for i in rng.choice(len(right), FAVOURITES, replace=False)] for w in left}


def _next(rng: np.random.Generator, word: str, left: list[str], right: list[str], salt: int) -> str:
    table = _bigrams(tuple(left), tuple(right), salt)
    # Zipf-like choice among the favourites: 1/2, 1/4, … of the mass
    rank = min(int(rng.geometric(0.5)) - 1, FAVOURITES - 1)
    return table[word][rank]


def sentence(rng: np.random.Generator) -> str:
    """One sentence, e.g. "The old king crossed the river near a tower slowly." """
    pick = lambda words: words[int(rng.integers(len(words)))]  # noqa: E731
    det = pick(lexicon.DETERMINERS)
    words = [det.capitalize()]
    if rng.random() < 0.6:
        adjective = pick(lexicon.ADJECTIVES)
        words += [adjective, _next(rng, adjective, lexicon.ADJECTIVES, lexicon.NOUNS, 1)]
    else:
        words += [pick(lexicon.NOUNS)]
    verb = _next(rng, words[-1], lexicon.NOUNS, lexicon.VERBS, 2)
    words += [verb, "the", _next(rng, verb, lexicon.VERBS, lexicon.NOUNS, 3)]
    if rng.random() < 0.5:
        preposition = _next(rng, words[-1], lexicon.NOUNS, lexicon.PREPOSITIONS, 4)
        words += [preposition, "a", _next(rng, preposition, lexicon.PREPOSITIONS, lexicon.NOUNS, 5)]
    if rng.random() < 0.3:
        words += [pick(lexicon.ADVERBS)]
    return " ".join(words) + "."


def prose(rng: np.random.Generator, sentences: int) -> list[str]:
    """A list of sentences."""
    return [sentence(rng) for _ in range(sentences)]


def code(rng: np.random.Generator, lines: int) -> str:
    """Code-like text, the second domain of `dormancy`: ``width = load(path, mode)``."""
    pick = lambda words: words[int(rng.integers(len(words)))]  # noqa: E731
    rows = []
    for _ in range(lines):
        arguments = ", ".join(pick(lexicon.ARGUMENTS) for _ in range(int(rng.integers(1, 4))))
        rows.append(f" {pick(lexicon.ARGUMENTS)} = {pick(lexicon.FUNCTIONS)}( {arguments} )")
    return "\n".join(rows)
