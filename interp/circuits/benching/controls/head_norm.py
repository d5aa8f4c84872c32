"""Heads by how much they write, whatever it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.paired_runs import PairedRuns


@dataclass(frozen=True)
class HeadNorm(Method):
    """score(h) = mean over the clean prompts' tokens of ‖z_h W_O,h‖.

    Misleads:
        Large heads are often heads that matter, so that a method may look good by finding them.
    """

    name = "head_norm"
    title = "Norm of the output"
    summary = "how much a head writes into the stream, whatever it is"
    reading = "The mean norm of what the head adds to the residual stream."
    formula = "mean ‖z_h W_O,h‖"
    citation = "control"

    def shuffles(self) -> tuple[str, ...]:
        return ()

    def find(self, runs: PairedRuns) -> Found:
        W_O = {
            layer: runs.model.head_weights(layer, site.tower).W_O.float()
            for layer, site in runs.sites.items()
        }
        total, count = torch.zeros(len(runs.heads), dtype=torch.float64), 0
        batches = runs.batches()
        runs.expect(len(batches))
        for pairs in batches:
            _, activations = runs.run(pairs, keep=("z",))
            real = pairs.mask.bool()
            norms = [
                torch.einsum("thd,hdm->thm", activations["z", layer][real].float(), W_O[layer])
                .norm(dim=-1)
                .sum(0)
                for layer in runs.layers
            ]  # (heads,) each
            total += torch.cat(norms).double().cpu()
            count += int(real.sum())
            runs.step(self.title)
        return Found(np.asarray(total / count))
