"""In-context and parametric heads: whose output carries an answer that the context gives, and whose
one that the weights know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from interp.edits.scale_heads import ScaleHeads
from interp.errors import InputError
from interp.inputs import lexicon
from interp.inputs.forward import forward
from interp.inputs.tokenizer import Text
from interp.scores.importance import heads
from interp.scores.score import ModelScore
from interp_hooks.heads import Head
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp.inputs.pace import Pace
    from interp.probes.settings import Settings
    from interp_hooks.model import HookedModel

#: relation → what is asked of a word
ASKED = {
    "capital": "The capital of {} is",
    "past": "The past tense of {} is",
    "opposite": "The opposite of {} is",
}
#: problems that a model must solve both ways
LEAST = 4
#: tokens of the two prompts, about
LENGTH = 40


class InContext(ModelScore):
    """Share of the heads' attribution in open-book answers less the share in closed-book ones.

    Of a fact that the model knows ("The capital of France is", Paris) and another answer that a
    context gives ("The capital of France is Rome. The capital of France is", Rome), with y the
    answer that the model gives and R_h = ∂ log P(y) / ∂ξ_h at ξ = 1, z_h ← ξ_h z_h,

        |R_h| / Σ_g |R_g| with the context, less the same without it

    Above 0: in-context heads, which read the answer; below 0: parametric heads, which recall it.
    Kahardipraja et al. attribute by layer-wise relevance; this is gradient × output, the first
    order of both. Only problems that are solved both ways count.

    Misleads:
        An attribution is no effect: ablate what it names, in both kinds of prompts, beside random
        heads. Heads that copy are found by any open-book prompt, whatever it is about.
    """

    name = "in_context"
    title = "In-context minus parametric"
    reading = (
        "How much more of the heads' attribution of an answer falls to this head where a context "
        "gives the answer than where the model must know it; below 0: where it must know it."
    )
    formula = "|R_h| / Σ_g |R_g| with context − the same without, R_h = ∂ log P(y) / ∂ξ_h"
    citation = "after Kahardipraja et al. 2025, arXiv 2505.15807"
    low = None
    high = None
    length = LENGTH
    probe = "own"
    passes = "4 forwards and 2 backwards a problem"
    optional = True
    needs_words = True

    def cost(self, model: HookedModel, settings: Settings) -> int:
        self._check(model, settings)
        return settings.samples * 2 * LENGTH

    def seconds(self, model: HookedModel, settings: Settings, pace: Pace) -> float:
        def run(ids: torch.Tensor) -> object:
            return attributed(model, ids[0].tolist(), 0)

        return pace.of("answer's gradient", run, 2 * settings.samples, LENGTH // 2)

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return settings.samples + 1

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        by_head: dict[Head, list[float]] = {head: [] for head in heads(model)}
        solved = 0
        for closed, known, opened, told in problems(model, settings.seed):
            if solved == settings.samples:
                break
            if said(model, closed) != known or said(model, opened) != told:
                continue
            solved += 1
            shares = [attributed(model, ids, y) for ids, y in ((opened, told), (closed, known))]
            for head, values in by_head.items():
                values.append(shares[0][head] - shares[1][head])
            yield []
        for _ in range(settings.samples - solved):
            yield []
        yield list(by_head.items())

    def _check(self, model: HookedModel, settings: Settings) -> None:
        """Raise `InputError` for a model that knows too little, or does not listen."""
        solved, tried = 0, 0
        for closed, known, opened, told in problems(model, settings.seed):
            tried += 1
            solved += said(model, closed) == known and said(model, opened) == told
            if solved == LEAST:
                return
        raise InputError(
            f"{model.name} answers {solved} of {tried} facts both from memory and against it from "
            f"a context, and in_context needs {LEAST}."
        )


def problems(model: HookedModel, seed: int) -> Iterator[tuple[list[int], int, list[int], int]]:
    """(closed-book prompt, its answer, open-book prompt, its other answer), shuffled over all
    relations. Answers are the tokens that begin them."""
    text, rng = Text(model.tokenizer), np.random.default_rng(seed)
    posed = []
    for relation, asked in ASKED.items():
        words = lexicon.RELATIONS[relation]
        pairs = list(zip(words[::2], words[1::2], strict=True))
        for number, (subject, answer) in enumerate(pairs):
            others = [b for i, (_, b) in enumerate(pairs) if i != number and b != answer]
            posed.append((asked.format(subject), answer, others[int(rng.integers(len(others)))]))
    for i in rng.permutation(len(posed)):
        question, answer, other = posed[i]
        known, told = (text.encode(f" {word}")[0] for word in (answer, other))
        if known != told:
            opened = text.prompt(f"{question} {other}. {question}")
            yield text.prompt(question), known, opened, told


@torch.no_grad()
def said(model: HookedModel, ids: list[int]) -> int:
    """The token that the model says next."""
    return int(logits_of(forward(model, torch.tensor([ids]), keep=1))[0, -1].argmax())


def attributed(model: HookedModel, ids: list[int], answer: int) -> dict[Head, float]:
    """head → |R_h| / Σ |R| of the log-probability of `answer` after a prompt."""
    gains = {h: torch.ones((), device=model.device, requires_grad=True) for h in heads(model)}
    with torch.enable_grad(), model.edit(ScaleHeads(gains)):
        logits = logits_of(forward(model, torch.tensor([ids]), keep=1))[0, -1].float()
        gain = logits.log_softmax(-1)[answer]
        found = torch.autograd.grad(gain, list(gains.values()), allow_unused=True)
    size = {h: 0.0 if g is None else abs(float(g)) for h, g in zip(gains, found, strict=True)}
    total = sum(size.values())
    return {h: value / total if total else 0.0 for h, value in size.items()}
