"""Heads that look at the thing being named."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_kernels import Received


class Gaze(Score):
    """AUC of the weights on the named thing's patches against those on all others:

        P(a_gold > a_other) + ½ P(a_gold = a_other), a = A[q, ·] of the token q before its word

    over pairs of patches, mean over the things of a scene's true caption. 1 where every patch of
    the thing gets more than any other, .5 by chance (and in a head that gives all the same, or sees
    none), visual sinks among the others. Only the order of the weights counts, not how much of a
    row is on the image: `image_mass` says that.

    Misleads:
        Only the order of the weights counts: a head that gives the picture next to nothing may have
        1. Read `image_mass` beside it. Rendered scenes are no photographs.
    """

    name = "gaze"
    title = "Gaze"
    reading = (
        "How well a head's weights tell the patches of the thing about to be named from the "
        "picture's others: 0.5 is chance."
    )
    formula = "mean over named things of P(a_gold > a_other) + ½ P(a_gold = a_other)"
    citation = "gaze heads: arXiv 2606.14703; measured here as an AUC on rendered scenes"
    threshold = 0.9
    role = "looks at the thing named next"
    probe = "named"
    default = True
    needs_images = True
    needs_scenes = True
    drawn = 3

    def ask(self, batch: ProbeBatch) -> Question:
        received = {}
        for n, look in enumerate(batch.info["looked"]):
            queries = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
            queries[0, look.rows] = True
            # what a key receives from one query alone is that query's weight on it
            received[_key(n)] = Received(queries, reduce="sum")
        return Question(received=received)

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        """NaN for a scene no thing of which has a patch."""
        looked = batch.info["looked"]
        values = []
        for n, look in enumerate(looked):
            row = layer.received[_key(n)][0]  # (heads, keys)
            gold, others = look.gold.to(row.device), look.others.to(row.device)
            values.append(auc(row[:, gold], row[:, others]))
        if not values:
            return torch.full((1, layer.site.n_heads), torch.nan)
        return torch.stack(values).mean(0)[None]


def _key(n: int) -> str:
    return f"named-{n}"


def auc(gold: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """P(g > o) + ½ P(g = o) of each row, (heads,) float64, from (heads, n) and (heads, m).

    By ranks, O((n + m) log m): how many of the others are below, and how many at most as large.

    Example:
        >>> auc(torch.tensor([[0.3, 0.1]]), torch.tensor([[0.1, 0.2]]))
        tensor([0.6250], dtype=torch.float64)
    """
    ordered, gold = others.contiguous().sort(-1).values, gold.contiguous()
    below = torch.searchsorted(ordered, gold)
    to = torch.searchsorted(ordered, gold, right=True)
    return (below + to).double().mean(-1) / (2 * others.shape[-1])
