"""Gates on heads or edges: soft ones, hard-concrete ones, and runs under them through which
gradients flow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from interp_hooks.activations import Hook

if TYPE_CHECKING:
    from interp.circuits.runs.paired_runs import PairedRuns
    from interp.circuits.runs.prompts import Pairs


#: of the hard-concrete distribution (Louizos et al. 2018): temperature, and how far the interval
#: is stretched beyond 0 and 1
BETA, LOW, HIGH = 2 / 3, -0.1, 1.1


def hard_concrete(alpha: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Gates in [0, 1], 0 and 1 themselves with positive probability, as `alpha`: clamp(σ((logit(u)
    + α) / β) · (HIGH − LOW) + LOW) with u uniform; gradients flow to alpha."""
    u = torch.rand(alpha.shape, generator=draw, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    noise = (u.log() - (1 - u).log()).to(alpha)
    return _stretched(((noise + alpha) / BETA).sigmoid())


def settled(alpha: torch.Tensor) -> torch.Tensor:
    """The gates without noise."""
    return _stretched(alpha.sigmoid())


def _stretched(gate: torch.Tensor) -> torch.Tensor:
    return (gate * (HIGH - LOW) + LOW).clamp(0, 1)


def chance_open(alpha: torch.Tensor) -> torch.Tensor:
    """P(gate > 0) of each."""
    return (alpha - BETA * math.log(-LOW / HIGH)).sigmoid()


def mixing(
    runs: PairedRuns, gates: torch.Tensor, stand_ins: Mapping[int, torch.Tensor | float]
) -> Hook:
    """A rewrite of z: g · z + (1 − g) · stand-in with `gates` (heads,) in the order of
    `runs.heads`; gradients flow to the gates."""
    rows: dict[int, torch.Tensor] = {}
    start = 0
    for layer, site in runs.sites.items():
        rows[layer] = gates[start : start + site.n_heads]
        start += site.n_heads

    def write(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        if place != "z":
            return None
        stand_in = stand_ins[layer]
        if not isinstance(stand_in, float):
            stand_in = stand_in.to(tensor)
        gate = rows[layer].to(tensor)[:, None]
        return gate * tensor + (1 - gate) * stand_in  # a head itself at 1, its stand-in at 0

    return write


def gated_logits(
    runs: PairedRuns,
    pairs: Pairs,
    gates: torch.Tensor,
    stand_ins: Mapping[int, torch.Tensor | float],
) -> torch.Tensor:
    """(batch, last slots, vocabulary) of a clean run under these gates, with its graph where they
    take a gradient."""
    if gates.requires_grad:
        runs.again(pairs)
    with torch.set_grad_enabled(gates.requires_grad):
        return runs.logits(pairs, pairs.clean, mixing(runs, gates, stand_ins))[0]
