"""HISP, head importance score for pruning: the expected size of gradient × activation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.circuits.methods.attribution import first_order
from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.paired_runs import MODES, PairedRuns


@dataclass(frozen=True)
class HISP(Method):
    """I_h = mean over prompts of |Σ over positions and d of (z_h − stand-in) · ∂m/∂z_h|, at the
    clean run.

    The absolute value is taken prompt by prompt, so that a head which helps on some prompts and
    hurts on others counts; `effect` is the mean without it. `normalise`: each layer's scores are
    divided by their L2 norm, as Michel et al. do (section 4.1); scores of different layers are then
    shares, no longer in units of the metric. `mode`: "zero" is their importance; "resample"
    subtracts z of the corrupted twin first, as Conmy et al. do.

    Both take the gradient of a loss. Here it is that of the task's metric: a divergence from the
    model's own output, as in Conmy et al., has gradient 0 at the clean run.

    Misleads:
        Divided by the layer's norm, a layer in which nothing matters has heads as high as any
        other's; `normalise=False` leaves the metric's units.
    """

    mode: str = "zero"
    normalise: bool = True

    name = "hisp"
    title = "Head importance (HISP)"
    summary = "mean |gradient × activation|, normalised within each layer"
    reading = "How sensitive the metric is to this head, prompt by prompt."
    formula = "E_x |Σ (z_h − stand-in) · ∂m/∂z_h|, divided by its L2 norm over the layer's heads"
    citation = (
        "Michel et al. 2019, arXiv 1905.10650, section 4.1; Conmy et al. 2023, arXiv "
        "2304.14997, section 4"
    )
    presets = {"resample": {"mode": "resample"}}

    def check(self) -> None:
        self.choice("mode", *MODES)

    def find(self, runs: PairedRuns) -> Found:
        effects = first_order(runs, self.mode, self.title)  # (heads, n)
        score = np.abs(effects).mean(1)
        notes = []
        if self.normalise:
            layer_of = np.array([h.layer for h in runs.heads])
            for layer in runs.layers:
                size = float(np.linalg.norm(score[layer_of == layer]))
                if size > 0:
                    score[layer_of == layer] /= size
                else:
                    notes.append(
                        f"The metric does not depend on layer {layer} at all; its heads have "
                        "importance 0."
                    )
        return Found(score, effects.mean(1), effects=effects, notes=notes)
