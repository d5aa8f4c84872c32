"""Short passages with a question that they answer and one that they don't, for what relevance does
to a model's states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.inputs import lexicon


@dataclass(frozen=True)
class Passage:
    """A passage, the question that it answers, one that it does not, and the answer in it.

    Example:
        >>> from interp.inputs.relevance import passages
        >>> one = passages(4, seed=0)[0]
        >>> one.answer in one.text, one.relevant == one.irrelevant
        (True, False)
    """

    text: str
    relevant: str
    irrelevant: str
    answer: str


#: (a sentence, what asks for its last blank): who, thing, place, colour
FACTS = (
    ("{who} left the {color} {thing} in the {place}.", "Where did {who} leave the {thing}?",
     "place"),
    ("{who} painted the old {thing} {color} yesterday.", "Which colour is the {thing} of {who}?",
     "color"),
    ("In the {place}, {who} found a {color} {thing}.", "What did {who} find in the {place}?",
     "thing"),
    ("After work {who} took the bus to the {place}.", "Where did {who} go after work?", "place"),
)  # fmt: skip


def passages(n: int, seed: int = 0) -> list[Passage]:
    """`n` passages of two sentences each, of other people, things and places; the irrelevant
    question is another passage's."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        one, other = (int(i) for i in rng.permutation(len(FACTS))[:2])
        first, second = _filled(one, rng), _filled(other, rng)
        text = f"{first[0]} {second[0]}" if rng.integers(2) else f"{second[0]} {first[0]}"
        made.append((text, first[1], first[2]))
    return [
        Passage(text, asked, made[(i + 1) % n][1], answer)
        for i, (text, asked, answer) in enumerate(made)
    ]


def _filled(fact: int, rng: np.random.Generator) -> tuple[str, str, str]:
    """A sentence, its question, and the answer."""
    pools = dict(who=lexicon.NAMES, thing=lexicon.OBJECTS, place=lexicon.PLACES,
                 color=lexicon.COLORS)  # fmt: skip
    words = {name: str(rng.choice(pool)) for name, pool in pools.items()}
    sentence, asked, blank = FACTS[fact]
    return sentence.format(**words), asked.format(**words), words[blank]
