"""Safety heads: what the next token after a request that should be declined owes to a head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from interp.inputs.endings import main_heads
from interp.inputs.requests import asked, prompts, requests
from interp.inputs.tokenizer import Text
from interp.mechanics.ablated_ends import AblatedEnds, divergence
from interp.scores.score import ModelScore
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.inputs.pace import Pace
    from interp.probes.settings import Settings
    from interp_hooks.model import HookedModel

#: tokens of a request with what is around it, about
LENGTH = 45


class Ships(ModelScore):
    """KL(P(y | x) ‖ P(y | x, head h ablated)) of the next token y after a request x that should be
    declined: the safety head important score.

    Ablated is the head's pattern, at all tokens of the prompt: every key it sees gets the same
    weight, what scaling its queries or keys towards 0 comes to. Requests are described and not
    made: they say that something is forbidden or harmful, and not what
    (`interp.inputs.requests`).

    Misleads:
        A head that any next token needs, of the first layer above all, has a large divergence after
        every request. `ships_excess` takes off what the same head does after a harmless twin, and
        whether refusals fall without it must be asked of refusals.
    """

    name = "ships"
    title = "Ships"
    reading = (
        "How far the next token's distribution moves, after a request that should be declined, "
        "when this head attends evenly; nats. High in heads that refuse, and in heads that "
        "everything needs."
    )
    formula = "KL(P(y | x) ‖ P(y | x, A_h := uniform))"
    citation = "Zhou et al. 2024, arXiv 2410.13708 (Ships)"
    unit = "nats"
    high = None
    length = LENGTH
    probe = "own"
    passes = "1 a head and request, from the head's layer on"
    optional = True
    needs_words = True
    #: which sides of a pair of requests it reads: 0 to be declined, 1 its twin
    sides: tuple[int, ...] = (0,)

    def cost(self, model: HookedModel, settings: Settings) -> int:
        check_english(model)
        tokens = len(self.sides) * settings.samples * LENGTH
        return tokens * (len(main_heads(model)) + 4) // 2

    def seconds(self, model: HookedModel, settings: Settings, pace: Pace) -> float:
        rows = self.cost(model, settings) / LENGTH
        return pace.plain(1, LENGTH) * rows

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return len(main_heads(model))

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        check_english(model)
        pairs, text = requests(settings.samples, settings.seed), Text(model.tokenizer)
        sides = [AblatedEnds(model, prompts(text, pairs, side)) for side in self.sides]
        plain = [ends.log_probs([]) for ends in sides]
        for head in main_heads(model):
            moved = [
                divergence(before, ends.log_probs([head])).tolist()
                for before, ends in zip(plain, sides, strict=True)
            ]
            yield [(head, self.value(moved))]

    def value(self, moved: Sequence[list[float]]) -> list[float]:
        """A value a pair of requests, of the divergences on each side."""
        return moved[0]


def check_english(model: HookedModel) -> None:
    """Raise `InputError` for a model without a tokenizer, or one that knows no English words."""
    from interp.errors import InputError

    text = Text(model.tokenizer)
    if not text.natural:
        raise InputError(
            f"The tokenizer of {model.name} spells everyday English out, so requests in words mean "
            "nothing to it."
        )
    asked(text, "")
