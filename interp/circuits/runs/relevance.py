"""Whether the rules of another backward pass reach all of a model, seen on pairs of prompts."""

from __future__ import annotations

import torch

from interp.circuits.runs.paired_runs import PairedRuns
from interp.streams.backward import check_relevance


def check_rules(runs: PairedRuns) -> None:
    """Raise `TapError` where relevance is lost between the logits and the stream that enters the
    first layer (`interp.streams.backward.check_relevance`)."""
    first = runs.layers[0]
    pairs = runs.prompts.batches(runs.model, 1)[0]

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        entering: list[torch.Tensor] = []

        def enter(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
            if (place, layer) != ("pre", first):
                return None
            entering.append(tensor.detach().requires_grad_())
            return entering[-1]

        return runs.logits(pairs, pairs.clean, enter)[0][:, -1:], entering

    check_relevance(runs.model, run)
