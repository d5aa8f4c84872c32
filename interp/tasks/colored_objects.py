"""Coloured objects (Merullo et al. 2024, ICLR, "Circuit component reuse across tasks")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.inputs import lexicon
from interp.inputs.tokenizer import Text
from interp.tasks.task import Problem, Task, choose


def _scene(things: list[str], colors: list[str], asked: str) -> str:
    listed = [
        f"{'an' if c[0] in 'aeiou' else 'a'} {c} {t}" for c, t in zip(colors, things, strict=True)
    ]
    table = f"{', '.join(listed[:-1])}, and {listed[-1]}"
    return f"On the table, there is {table}. What color is the {asked}? Answer:"


@dataclass(frozen=True)
class ColoredObjects(Task):
    """ "On the table, there is a red pencil, a blue cup, and a green ball. What color is the cup?
    Answer:" → " blue".

    Optionally after solved examples (`shots`); the corrupted prompt asks for another of the
    objects.

    Misleads:
        A model may know the colour and not say it after "Answer:": ask in another format before
        concluding that it can't.
    """

    shots: int = 0

    name = "colored_objects"
    summary = "colour of one of three listed objects"
    citation = "Merullo et al. 2024, ICLR (circuit component reuse); BIG-bench"
    formats = ("bare", "lead", "few-shot", "chat")

    def compose(self, text: Text, rng: np.random.Generator) -> Problem:
        things, colors = text.pool(lexicon.OBJECTS, 3), text.pool(lexicon.COLORS, 3)
        context = ""
        for _ in range(self.shots):
            t, c = choose(rng, things, 3), choose(rng, colors, 3)
            k = int(rng.integers(3))
            context += f"{_scene(t, c, t[k])} {c[k]}. "
        t, c = choose(rng, things, 3), choose(rng, colors, 3)
        k = int(rng.integers(3))
        other = (k + int(rng.integers(1, 3))) % 3
        return Problem(
            clean=context + _scene(t, c, t[k]),
            corrupted=context + _scene(t, c, t[other]),
            answer=f" {c[k]}",
            wrong=tuple(f" {c[i]}" for i in range(3) if i != k),
            info=dict(objects=t, colors=c, asked=t[k]),
            lead=f" The color of the {t[k]} is",
            corrupted_lead=f" The color of the {t[other]} is",
            ask="Answer the question about the things on the table.",
        )
