"""Discrete-SAE circuits: give every head's output a code, and see which codes go with the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from interp.circuits.methods.circuit_method import Found
from interp.circuits.methods.codes import edge_score, node_score
from interp.circuits.methods.coding import CodedMethod, Codes

SCORES = ("node", "edge")
PAIRS = ("once", "twice")


@dataclass(frozen=True)
class DiscreteSAE(CodedMethod):
    """O'Neill and Bui 2024, arXiv 2405.12522: one sparse autoencoder for the outputs of all heads,
    of which only the strongest feature is kept, a head's *code* in an example. Positive examples
    are the clean prompts, negative ones the corrupted.

    score: "node": how many different codes of a head are seen in positive and never in negative
    examples. "edge": the same of pairs of codes of two heads; a head counts by how often it is an
    end of the strongest pairs. Low and high are the score's 2.5 and 97.5 % quantiles over trials.

    pairs: in score "edge", the first heads²/2 ends of the list of pairs count, as the paper says;
    the released list holds each pair "twice" (preset "code"), so that a quarter as many pairs do.

    The other settings are the paper's (`CodedMethod`). The autoencoder that reconstructs best is
    the artefact "sae", in SAELens's own format.

    Misleads:
        It sees heads whose output tells clean from corrupted prompts, whether or not anything reads
        it, and not those that work alike in both. Counts of codes grow with the spread of a head's
        output, with no metric in them at all.
    """

    score: str = "node"
    pairs: str = "once"

    name = "discrete_sae"
    title = "Discrete SAE"
    summary = "codes of a small sparse autoencoder that only clean prompts have; seconds"
    reading = "How many codes of this head are seen on clean prompts and never on corrupted ones."
    formula = "|codes(+) ∖ codes(−)|, of heads or of pairs of heads"
    citation = "O'Neill and Bui 2024, arXiv 2405.12522, section 4"
    presets = {
        "paper": {},
        "paper-edge": {"score": "edge"},
        "paper-docstring": {"sparsity": 0.05},
        "code": {"score": "edge", "pairs": "twice"},
    }

    def check(self) -> None:
        super().check()
        self.choice("score", *SCORES)
        self.choice("pairs", *PAIRS)

    def caption(self) -> str:
        if self.score == "node":
            return self.reading
        return (
            "How many strong pairs of codes with this head in them are seen on clean prompts and "
            "never on corrupted ones."
        )

    def score_of(self, codes: Codes, attributed: np.ndarray | None, seed: int) -> np.ndarray:
        if self.score == "node":
            return node_score(codes.positive, codes.negative)
        return edge_score(codes.pairs, twice=self.pairs == "twice")

    def found(
        self, scores: np.ndarray, attributed: np.ndarray | None, edges: pd.DataFrame, **more: Any
    ) -> Found:
        if len(scores) < 2:
            return super().found(scores, attributed, edges, **more)
        low, high = np.quantile(scores, [0.025, 0.975], axis=0)
        spread = dict(stderr=scores.std(0, ddof=1), low=low, high=high)
        return super().found(scores, attributed, edges, **spread, **more)
