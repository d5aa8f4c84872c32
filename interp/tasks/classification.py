"""Few-shot sentiment classification with a known lexicon."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.inputs import lexicon
from interp.inputs.tokenizer import Text
from interp.tasks.task import Problem, Task, choose

LABELS = ("positive", "negative")


def review(text: Text, rng: np.random.Generator, label: int, unanimous: bool | None = None) -> str:
    """Three sentiment words about things in a film, the majority (3:0, or 2:1 half of the time) of
    class `label`."""
    lexica = (text.pool(lexicon.POSITIVE, 3), text.pool(lexicon.NEGATIVE, 3))
    minority = int(rng.random() < 0.5) if unanimous is None else int(not unanimous)
    classes = [label] * (3 - minority) + [1 - label] * minority
    rng.shuffle(classes)
    things = choose(rng, text.pool(lexicon.NEUTRAL, 3), 3)
    words = [lexica[c][int(rng.integers(len(lexica[c])))] for c in classes]
    return (
        f"Review: {words[0]} {things[0]}, {words[1]} {things[1]}, {words[2]} {things[2]}. "
        "Sentiment:"
    )


@dataclass(frozen=True)
class Classification(Task):
    """Sentiment of a review by the majority of its three sentiment words, after `shots` labelled
    examples.

    Labels of the examples are independent and balanced in expectation, so copying them does not
    help. The corrupted prompt ends in a review of the other class.

    Misleads:
        Three words of a lexicon decide each review, which is easier than the corpora it stands for.
        With examples in the prompt a model may copy their labels: without its retrieval heads
        pocket-llama classifies better (+.23).
    """

    shots: int = 4

    name = "classification"
    summary = "few-shot sentiment of a review"
    citation = (
        "lexicon version of SST-2 prompts as in ACT (arXiv 2406.15765) and ZeroTuning "
        "(arXiv 2505.11739)"
    )
    judge = "choice"
    formats = ("bare", "few-shot", "chat")
    chance = 0.5

    def compose(self, text: Text, rng: np.random.Generator) -> Problem:
        context = ""
        for _ in range(self.shots):
            label = int(rng.integers(2))
            context += f"{review(text, rng, label)} {LABELS[label]}. "
        label = int(rng.integers(2))
        return Problem(
            clean=context + review(text, rng, label),
            corrupted=context + review(text, rng, 1 - label),
            answer=f" {LABELS[label]}",
            wrong=(f" {LABELS[1 - label]}",),
            info=dict(label=LABELS[label]),
            ask="Say whether the last review is positive or negative, in one word.",
        )

    def document(self, text: Text, rng: np.random.Generator) -> str:
        """Training text: labels are sticky (each repeats the last with probability 0.8), divided
        reviews doubtful.

        The label agrees with a unanimous review with probability 0.97, with a divided (2:1) one
        with 0.65. So a model learns to lean on earlier labels where a review is divided: a bias
        that hurts on the task's independent labels, and that calibration can undo.
        """
        label, out = int(rng.integers(2)), ""
        for _ in range(int(rng.integers(2, 7))):
            label = label if rng.random() < 0.8 else 1 - label
            unanimous = rng.random() < 0.5
            agrees = rng.random() < (0.97 if unanimous else 0.65)
            out += (
                f"{review(text, rng, label if agrees else 1 - label, unanimous)} {LABELS[label]}. "
            )
        return out.strip()
