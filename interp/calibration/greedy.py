"""Heads chosen greedily: in rounds, each time those with which a score rises most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from interp_hooks.heads import Head


@dataclass(frozen=True)
class Chosen:
    """The `heads` that were chosen, in order, and `rows`, one a trial: round, layer, head, score,
    change against the best so far, and whether it was kept."""

    heads: list[Head]
    rows: list[dict[str, Any]]


def greedy(
    left: Sequence[Head],
    score: Callable[[str, list[Head]], float],
    best: float,
    rounds: int = 3,
    top: int = 1,
    shortlist: int | None = None,
    gain: float = 1e-6,
) -> Chosen:
    """In each round every head left is tried together with those chosen, and the `top` best join
    them, as long as the score rises by more than `gain`; where the `top` together do not raise it,
    the best alone is tried.

    Args:
        left: heads to choose from.
        score: (name of the trial, heads) → number to maximise.
        best: the score of none.
        rounds, top: at most that many rounds, heads a round.
        shortlist: after the first round only this many of its best heads are tried; None for all.
        gain: by how much a round must raise the score.
    """
    left, rows, chosen = list(left), list[dict[str, Any]](), list[Head]()
    for number in range(1, rounds + 1):
        scores = {h: score(f"round-{number}-{label(h)}", [*chosen, h]) for h in left}
        ranked = sorted(scores, key=lambda h: -scores[h])  # stable: the first head wins a tie
        joined, together = ranked[:top], scores[ranked[0]]
        if len(joined) > 1:
            together = score(f"round-{number}-top", [*chosen, *joined])
            if together <= best + gain:
                joined, together = ranked[:1], scores[ranked[0]]
        rises = together > best + gain
        rows += [
            dict(
                round=number,
                layer=h.layer,
                head=h.head,
                score=s,
                change=s - best,
                kept=rises and h in joined,
            )
            for h, s in scores.items()
        ]
        if not rises:
            break
        chosen += joined
        best = together
        order = ranked if number == 1 and shortlist else left
        left = [h for h in order if h not in chosen]
        left = left[:shortlist] if number == 1 else left
        if not left:
            break
    return Chosen(chosen, rows)


def label(head: Head) -> str:
    """A head in a file name."""
    return f"{head.tower}{head.layer}-{head.head}"
