"""Function-vector heads: whose output carries what the examples of a prompt show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from interp.inputs import lexicon
from interp.inputs.endings import Ending, last_outputs, main_heads, put_back
from interp.inputs.shown import shown_pairs
from interp.inputs.tokenizer import Text
from interp.scores.score import ModelScore
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.probes.settings import Settings
    from interp_hooks.model import HookedModel

SHOTS = 10
#: pairs of which a relation must have so many, beside those that are shown
LEAST = 4
#: tokens of a prompt, about
LENGTH = 70


class FunctionVector(ModelScore):
    """P(y | shuffled examples, z_h := z̄_h) − P(y | shuffled examples), z̄_h the head's mean output
    at the last token of prompts with true examples: the average indirect effect of Todd et al.

    Relations: capitals, past tenses, opposites; ten examples a prompt; in the shuffled one they are
    the same with their outputs dealt out anew. A value is a prompt's, and z̄_h its relation's.

    Misleads:
        A model that hardly learns from examples has no such heads, and numbers near 0 are no
        ranking. z̄_h also carries what the relation's outputs have in common (they are cities), so
        that part of the effect is of the kind of word rather than of the function.
    """

    name = "function_vector"
    title = "Function vector"
    reading = (
        "How much the right output gains, where the examples are shuffled, when this head's output "
        "is its mean over prompts with true examples; a probability."
    )
    formula = "P(y | x̃, z_h := z̄_h) − P(y | x̃)"
    citation = "Todd et al. 2024, arXiv 2310.15213, §2.3"
    low = None
    high = None
    length = LENGTH
    probe = "own"
    passes = "2 a prompt, and its last token once a head"
    optional = True
    needs_words = True

    def cost(self, model: HookedModel, settings: Settings) -> int:
        prompts = settings.samples * len(self._relations(model))
        return prompts * (2 * LENGTH + len(main_heads(model)))

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return settings.samples * len(self._relations(model)) + 1

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        found: dict[Head, list[float]] = {head: [] for head in main_heads(model)}
        text = Text(model.tokenizer)
        for number, pairs in enumerate(self._relations(model).values()):
            rng = np.random.default_rng([settings.seed, number])
            asked = rng.permutation(len(pairs))[: settings.samples]
            prompts = [shown_pairs(text, pairs, int(i), SHOTS, rng) for i in asked]
            outputs = [last_outputs(model, p.ids, 1) for p in prompts]
            mean = {layer: torch.stack([z[layer] for z in outputs]).mean(0) for layer in outputs[0]}
            for prompt in prompts:

                def read(logits: torch.Tensor, y: int = prompt.answer[0]) -> torch.Tensor:
                    return logits[:, -1].float().softmax(-1)[:, y].cpu()

                for head, moved in put_back(Ending(model, prompt.shuffled, 1), mean, read):
                    found[head].append(moved)
                yield []
        yield list(found.items())

    def _relations(self, model: HookedModel) -> dict[str, list[tuple[str, str]]]:
        """Relations with enough pairs whose two words are single tokens after a space."""
        from interp.errors import InputError

        text = Text(model.tokenizer)
        found = {}
        for name, words in lexicon.RELATIONS.items():
            pairs = [
                (a, b)
                for a, b in zip(words[::2], words[1::2], strict=True)
                if all(len(text.encode(f" {word}")) == 1 for word in (a, b))
            ]
            if len(pairs) >= SHOTS + LEAST:
                found[name] = pairs
        if not found:
            raise InputError(
                "Of no relation (capitals, past tenses, opposites) are enough words single tokens "
                f"in the tokenizer of {model.name}."
            )
        return found
