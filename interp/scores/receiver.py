"""Receiver heads: whose later sentences all look back at the same few."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from interp.inputs.endings import main_heads
from interp.mechanics.sentence_links import GAP, check_sentences, sentence_links
from interp.scores.score import ModelScore

if TYPE_CHECKING:
    from interp.probes.settings import Settings
    from interp_hooks.heads import Head
    from interp_hooks.model import HookedModel


class Receiver(ModelScore):
    """Fisher's excess kurtosis of v over the sentences of a text, v_j = mean over the sentences
    i ≥ j + 4 of the mean weight of a token of i on a token of j; the first token is left out.

    Thought Anchors names heads by it that broadcast from a few sentences of a chain of thought, the
    plans and turns. `interp.mechanics.sentence_links` has the matrix behind it, `sentence_effects`
    what hiding each sentence does.

    Misleads:
        Kurtosis asks how uneven attention is, not at what: a head that rests on one title or one
        blank line is first. It grows with the number of sentences, so that texts of different
        lengths are not compared. On running prose there need be no such sentence.
    """

    name = "receiver"
    title = "Receiver heads"
    reading = (
        "How much the attention from later sentences goes to the same few sentences; 0 is as even "
        "as a normal distribution."
    )
    formula = "kurtosis_j(v), v_j = mean over i ≥ j + 4 of mean A[i, j]"
    citation = "Thought Anchors, arXiv 2506.19143"
    low = None
    high = None
    probe = "own"
    passes = "1, with all weights looked at"

    optional = True

    def cost(self, model: HookedModel, settings: Settings) -> int:
        for row in settings.rows(model.tokenizer):
            check_sentences(model, row)
        return 2 * settings.samples * settings.context

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return settings.samples + 1

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        found: dict[Head, list[float]] = {head: [] for head in main_heads(model)}
        for row in settings.rows(model.tokenizer):
            links = sentence_links(model, row)
            for head, value in zip(links.heads, links.kurtosis(GAP), strict=True):
                found[head].append(float(value))
            yield []
        yield list(found.items())
