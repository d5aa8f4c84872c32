"""Query-focused retrieval heads of pictures."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_kernels import Received


class ImageRetrieval(Score):
    """QRscore_h with the patches of the thing asked about as gold:

        (1/|q|) Σ_{t∈q} Σ_{p∈gold} A[t, p] − the same for the question about nothing

    q is "is there a X ?" for a thing X that is there, the other question "is there a N/A ?";
    patches of gold that get less than mean − 2·std of them are dropped, as QRHead does (a single
    one is kept).

    Misleads:
        Here the mass counts: a head that gives the picture little scores little, however well it
        aims. Below six patches of the thing the filter of weak ones never fires.
    """

    name = "image_retrieval"
    title = "Image retrieval"
    reading = (
        "Attention from a question to the patches of the thing it asks about, beyond what a "
        "question about nothing would give."
    )
    formula = "(1/|q|) Σ_{t∈q} Σ_{p∈gold} A[t, p]  −  the same with the question about N/A"
    citation = (
        "multimodal retrieval heads: arXiv 2605.27243, the score of Zhang et al. 2025 (QRHead), "
        "arXiv 2506.09944, on rendered scenes"
    )
    low = None
    high = None
    probe = "asked"
    default = True
    needs_images = True
    needs_scenes = True

    def ask(self, batch: ProbeBatch) -> Question:
        queries = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for row, look in enumerate(batch.info["looked"]):
            queries[row, look.rows] = True
        return Question(received={"asked": Received(queries)})

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        sums = []
        for row, look in enumerate(batch.info["looked"]):
            received = layer.received["asked"][row]  # (heads, keys)
            sums.append(_kept(received[:, look.gold.to(received.device)]).sum(-1))
        return (sums[0] - sums[1])[None]


def _kept(mass: torch.Tensor) -> torch.Tensor:
    """(heads, patches) without the patches far below the rest; one patch has no spread."""
    if mass.shape[-1] < 2:
        return mass
    floor = mass.mean(-1, keepdim=True) - 2 * mass.std(-1, keepdim=True)
    return torch.where(mass >= floor, mass, 0.0)
