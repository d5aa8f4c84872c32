"""Safety heads, less what the same head does after a harmless request."""

from __future__ import annotations

from collections.abc import Sequence

from interp.scores.ships import Ships


class ShipsExcess(Ships):
    """`ships` after a request that should be declined, less the same after its harmless twin.

    Twins have the same form and differ in what they ask for ("Tell me how to hurt somebody.", "Tell
    me how to thank somebody."), so a head that any next token needs falls out. The difference is
    ours; the paper keeps the divergence alone.

    Misleads:
        It says that the head matters more after such requests, not that it refuses: a head may hold
        a refusal back. Ablate what it names, beside random heads of the same layers, and look at
        refusals.
    """

    name = "ships_excess"
    title = "Ships, less the harmless twin's"
    reading = (
        "How much further the next token's distribution moves, when this head attends evenly, "
        "after a request that should be declined than after its harmless twin; nats."
    )
    formula = "KL(P(y | x) ‖ P_h(y | x)) − KL(P(y | x̃) ‖ P_h(y | x̃)), P_h: A_h := uniform"
    citation = "after Zhou et al. 2024, arXiv 2410.13708; the difference is ours"
    low = None
    passes = "2 a head and pair of requests, from the head's layer on"
    sides = (0, 1)

    def value(self, moved: Sequence[list[float]]) -> list[float]:
        return [one - other for one, other in zip(*moved, strict=True)]
