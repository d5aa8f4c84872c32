"""Residual-state peak at the first token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from interp.inputs.forward import forward
from interp.scores.score import ModelScore
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.probes.settings import Settings
    from interp_hooks.model import HookedModel

LENGTH = 256


class ResidualPeak(ModelScore):
    """‖x_first‖ / mean_{k>1} ‖x_k‖ of the residual stream entering the layer; the same for all
    heads of a layer.

    Misleads:
        It is one number a layer and tells nothing of single heads. Massive activations at other
        tokens do not show (SmolLM2 has some at " the"): `interp.massive_activations` lists all.
    """

    name = "residual_peak"
    title = "Residual peak"
    reading = (
        "How much larger the residual stream is at the first token than elsewhere, on "
        "entering this layer."
    )
    formula = "‖x₁‖ / mean_{k>1} ‖x_k‖ at the layer's input"
    citation = (
        "Guo et al. 2024, arXiv 2410.13835; Sun et al. 2024, arXiv 2402.17762 (massive activations)"
    )
    low = None
    high = None
    grain = "layer"
    length = LENGTH
    lists_massive = True
    probe = "own"
    passes = "1 a sample"

    def cost(self, model: HookedModel, settings: Settings) -> int:
        return settings.samples * min(LENGTH, settings.context)

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return 1

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        length = min(LENGTH, settings.context)
        rows = settings.rows(model.tokenizer, length)
        by_layer: dict[int, list[float]] = {}
        for row in rows:
            with model.capture_resid() as residual:
                forward(model, torch.tensor([row]), keep=1)
            for key, value in residual.items():
                if key != "final" and key[0] == "pre":
                    norm = value[0].float().norm(dim=-1)  # (tokens,)
                    by_layer.setdefault(key[1], []).append(float(norm[0] / norm[1:].mean()))
        yield [
            (h, by_layer[h.layer])
            for h in model.heads
            if h.tower == model.main_tower and h.layer in by_layer
        ]
