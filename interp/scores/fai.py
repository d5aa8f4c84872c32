"""Future attention influence."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_kernels import Received

NEAR, FAR = 10, 50


class FAI(Score):
    """max_{s>1} FAI_s, FAI_s = mean_{t∈[s+10, min(T, s+50)]} A[t, s], of each head; the first token
    is left out.

    The paper averages the 30 % most global heads into one curve over tokens; `interp.rhythm` gives
    that curve.

    Misleads:
        One token decides it, being a maximum: the strongest of a text, whatever makes it so. The
        first token is left out, later sinks are not, so a full stop that collects attention is an
        anchor here.
    """

    name = "fai"
    title = "Future attention influence"
    reading = "The strongest anchor: how much one token is attended to from 10 to 50 tokens later."
    formula = "max_{s>1} mean_{t=s+10…s+50} A[t, s]"
    citation = "Li et al. 2025, Attention Illuminates LLM Reasoning"
    probe = "text"

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(received={"future": Received(band=(NEAR, FAR))})

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        mean, count = layer.received["future"], layer.received_count["future"]
        order = layer.keys.long().cumsum(-1)[:, None]
        # only keys whose whole band lies in the text: means over few queries are large by chance
        whole = (order > 1) & (count >= count.max().clamp_max(FAR - NEAR + 1))
        return torch.where(whole, mean, 0.0).amax(-1)
