"""Attribution patching grouped by codes: what heads do to first order, cancelled within a code and
not between codes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.methods.codes import effect_score
from interp.circuits.methods.coding import CodedMethod, Codes


@dataclass(frozen=True)
class AttributionByCode(CodedMethod):
    """score(h) = Σ_c n_c/n · |mean effect of head h in the prompts in which its code is c|, the
    effect to first order, (z − mean z) · ∂m/∂z, from one backward pass.

    Codes are those of `discrete_sae`, from a shorter training. With one code for all prompts this
    is `attribution` with mode "mean", with a code a prompt the mean |effect|.

    shuffled: permute each head's codes over the prompts, which leaves how often each code is seen
    and takes away what it says of a prompt: the control.

    Misleads:
        What it finds, the attribution finds: with the codes shuffled, agreement and stability
        stayed as they were where it was tried (docs/methods.md). Use `attribution`.
    """

    sparsity: float = 0.2
    steps: int = 200
    rate: float = 2.5e-3
    standardise: bool = True
    variance: float = 0.9
    shuffled: bool = False

    name = "attribution_by_code"
    title = "Attribution by code"
    summary = "attribution grouped by codes; the codes add nothing measurable"
    reading = "How much a head does, to first order, in the prompts that its codes tell apart."
    formula = "Σ_c n_c/n · |mean over prompts with code c of Σ (z − z̄) · ∂m/∂z|"
    citation = (
        "Nanda 2023, Attribution patching, grouped by the codes of O'Neill and Bui 2024, arXiv "
        "2405.12522"
    )
    unit = "metric"
    attributes = True

    def twin(self) -> Method:
        return replace(self, shuffled=True)

    def score_of(self, codes: Codes, attributed: np.ndarray | None, seed: int) -> np.ndarray:
        assert attributed is not None
        positive = codes.positive
        if self.shuffled:
            rng = np.random.default_rng(seed)
            positive = rng.permuted(positive, axis=0)
        return effect_score(positive, attributed)

    def found(
        self, scores: np.ndarray, attributed: np.ndarray | None, edges: pd.DataFrame, **more: Any
    ) -> Found:
        assert attributed is not None
        effects = attributed.T  # (heads, n)
        return Found(scores.mean(0), effects.mean(1), effects=effects, edges=edges, **more)
