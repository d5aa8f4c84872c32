"""Query-focused retrieval heads, from one prefill."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_kernels import Received


class QR(Score):
    """QRscore_h = (1/|q|) Σ_{t_q∈q} Σ_{t_d∈d} A[t_q, t_d], minus the same for the question "N/A".

    d is the needle, q the question; tokens of d below mean − 2·std are dropped.

    Misleads:
        It is attention, not copying: a head that looks at the needle and writes nothing of it
        scores as high. With a needle of four tokens the filter of weak tokens never fires, and an
        issue at the released code reports that its published heads could not be reproduced.
    """

    name = "qr"
    title = "Query-focused retrieval"
    reading = (
        "Attention from the question to the needle, beyond what any question would give; "
        "needs no generation."
    )
    formula = "(1/|q|) Σ_{t∈q} Σ_{d∈needle} A[t, d]  −  the same with the question N/A"
    citation = "Zhang et al. 2025 (QRHead, EMNLP), arXiv 2506.09944"
    low = None
    high = None
    probe = "question"

    def ask(self, batch: ProbeBatch) -> Question:
        queries = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for row, (_, (start, stop)) in enumerate(batch.info["spans"]):
            queries[row, start:stop] = True
        return Question(received={"question": Received(queries)})

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        sums = []
        for row, ((start, stop), _) in enumerate(batch.info["spans"]):
            mass = layer.received["question"][row, :, start:stop]  # (heads, needle)
            floor = mass.mean(-1, keepdim=True) - 2 * mass.std(-1, keepdim=True)
            sums.append(torch.where(mass >= floor, mass, 0.0).sum(-1))
        return (sums[0] - sums[1])[None]
