"""Heads that write the next one of a series: days, months, numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from interp.scores.score import ModelScore
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.inputs.pace import Pace
    from interp.probes.settings import Settings
    from interp_hooks.model import HookedModel


class Successor(ModelScore):
    """The share of words of a series whose successor is what a head's OV circuit raises most among
    the words of all series; the mean over days, months, numbers, places in a row and letters.

    A word is taken as the stream after the first block of a prompt of it alone.

    Misleads:
        It is read from weights: what the head would write of a word, not whether it looks at one.
        That a model counts does not follow, and a model may count by other means.
    """

    name = "successor"
    title = "Successor"
    reading = (
        "The share of days, months, numbers … whose successor the head raises most of all such "
        "words; from weights alone. By chance 1 of some 70."
    )
    formula = "P(argmax_{w ∈ series} (x V O W_U)_w = successor of x)"
    citation = "Gould et al. 2023, arXiv 2312.09230"
    probe = "own"
    passes = "one of single words"
    optional = True
    needs_words = True

    def cost(self, model: HookedModel, settings: Settings) -> int:
        from interp.mechanics.weights import main_sites

        for site in main_sites(model):  # what is not known is told before the scan
            weights = model.head_weights(site.layer, site.tower)
            _ = weights.W_V, weights.W_O
        model.vocabulary()
        return sum(map(len, self._series(model).values()))

    def seconds(self, model: HookedModel, settings: Settings, pace: Pace) -> float:
        from interp.mechanics.ov_qk import seconds_of_folding

        return seconds_of_folding(model)

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return model.n_layers

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        from interp.mechanics.ov_words import raised

        series = self._series(model)
        words = sorted({word for some in series.values() for word in some})
        place = {word: i for i, word in enumerate(words)}
        for site, logits in raised(model, words, words):
            best = logits.argmax(-1).cpu()  # (heads, words)
            shares = [
                (
                    best[:, [place[w] for w in some[:-1]]]
                    == torch.tensor([place[w] for w in some[1:]])
                )
                .double()
                .mean(1)
                for some in series.values()
            ]
            by_head = torch.stack(shares, 1).tolist()  # (heads, series)
            yield [(Head(site.layer, h, site.tower), by_head[h]) for h in range(site.n_heads)]

    def _series(self, model: HookedModel) -> dict[str, list[int]]:
        from interp.errors import InputError
        from interp.inputs.tokenizer import Text
        from interp.mechanics.ov_words import ordered_words

        found = ordered_words(Text(model.tokenizer))
        if not found:
            raise InputError(
                "No series of words (days, months, numbers) is of single tokens in the tokenizer "
                f"of {model.name}."
            )
        return found
