"""How much of an output each position of an input accounts for, by five methods.

With x (positions, width) what enters, b a baseline and m the output:

    gradient    a_t = x_t · ∂m/∂x_t                      (Shrikumar et al. 2016, arXiv 1605.01713)
    integrated  a_t = (x_t − b_t) · ∫₀¹ ∂m/∂x_t (b + α(x − b)) dα   (Sundararajan et al. 2017,
                arXiv 1703.01365): Σ a_t = m(x) − m(b), but for the steps of the integral
    occlusion   a_t = m(x) − m(x with b_t for x_t)       (Zeiler and Fergus 2014, arXiv 1311.2901)
    deeplift    a_t = (x_t − b_t) · the slope of the lines through the runs of x and of b, function
                by function (Shrikumar et al. 2017, arXiv 1704.02685, rescale rule; products by
                halves): Σ a_t = m(x) − m(b), in two runs
    lrp         a_t = x_t · ρ_t, the relevance with attention's weights, norms' scales and
                activations' factors held (Ali et al. 2022, arXiv 2202.07304): Σ a_t = m but for
                what biases add
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from interp.errors import InputError, TapError
from interp.streams.backward import RELEVANCE, check_relevance, ruled
from interp.streams.secants import Secants

if TYPE_CHECKING:
    from interp_hooks import HookedModel

BASELINES = ("mean", "zero")
#: positions run together
BUDGET = 4096
#: largest share of m(x) − m(b) by which differences from a reference may miss it
COMPLETE = 0.02
#: nodes of the integral
STEPS = 32


@dataclass(frozen=True)
class Entered:
    """One input as it enters a model.

    value, away: (positions, width), what enters and its baseline. run: given a shift (rows,
    positions, width) of what enters, the outputs (rows, outputs) with their graph, and the leaf
    that entered.
    """

    model: HookedModel
    value: torch.Tensor
    away: torch.Tensor
    run: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    @property
    def difference(self) -> torch.Tensor:
        """(positions, width) x − b."""
        return self.value - self.away

    def still(self) -> torch.Tensor:
        """(1, positions, width): no shift."""
        return torch.zeros_like(self.value)[None]

    def outputs(self, shifts: torch.Tensor) -> torch.Tensor:
        """(rows, outputs) float64, without a graph."""
        return torch.cat([self.run(some)[0].detach().double() for some in self.chunks(shifts)])

    def chunks(self, shifts: torch.Tensor) -> Iterator[torch.Tensor]:
        """Rows that are run together."""
        yield from shifts.split(max(1, BUDGET // len(self.value)))


#: of an input and the integral's steps: (outputs, positions) float64
Saliency = Callable[[Entered, int], torch.Tensor]


def gradient(entered: Entered, steps: int = STEPS) -> torch.Tensor:
    """x · ∂m/∂x."""
    outputs, leaf = entered.run(entered.still())
    return torch.stack([(entered.value.double() * s[0]).sum(-1) for s in _slopes(outputs, leaf)])


def integrated(entered: Entered, steps: int = STEPS) -> torch.Tensor:
    """The integral by Gauss and Legendre: nodes are dense near the baseline, where norms make the
    output change fast."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    alphas = torch.tensor((nodes + 1) / 2, dtype=torch.float64)
    shares = torch.tensor(weights / 2, dtype=torch.float64).to(entered.value.device)
    away = (alphas - 1).to(entered.value)[:, None, None] * entered.difference  # b + α(x − b) − x
    found: torch.Tensor | None = None
    done = 0
    for some in entered.chunks(away):
        outputs, leaf = entered.run(some)
        share = shares[done : done + len(some)].to(shares)
        done += len(some)
        part = torch.stack([torch.einsum("s,std->td", share, s) for s in _slopes(outputs, leaf)])
        found = part if found is None else found + part
    assert found is not None
    return (entered.difference.double() * found).sum(-1)


def occlusion(entered: Entered, steps: int = STEPS) -> torch.Tensor:
    """One run a position, the baseline in its place."""
    count = len(entered.value)
    own = entered.outputs(entered.still())
    each = []
    for some in torch.arange(count).split(max(1, BUDGET // count)):
        shift = torch.zeros(len(some), *entered.value.shape).to(entered.value)
        shift[torch.arange(len(some)), some] = -entered.difference[some]
        each.append(own - entered.outputs(shift))
    return torch.cat(each).T


def deeplift(entered: Entered, steps: int = STEPS) -> torch.Tensor:
    """One pair of runs, x's and the baseline's. Raises `TapError` where its sum is not m(x) −
    m(b)."""
    shifts = torch.stack([torch.zeros_like(entered.value), -entered.difference])
    with ruled(entered.model, Secants()):
        outputs, leaf = entered.run(shifts)
        slopes = [slope[0] for slope in _slopes(outputs[:1], leaf)]
    found = torch.stack([(entered.difference.double() * s).sum(-1) for s in slopes])
    change = (outputs[0] - outputs[1]).detach().double()
    missed = (found.sum(-1) - change).abs() / torch.maximum(change.abs(), found.abs().amax(-1))
    if not bool((missed <= COMPLETE).all()):
        raise TapError(
            f"deeplift misses {float(missed.max()):.2g} of the change from the baseline in "
            f"{entered.model.name}, so some function in it (experts, a gate) is of a kind that is "
            "not known here; use integrated."
        )
    return found


def lrp(entered: Entered, steps: int = STEPS) -> torch.Tensor:
    """x · ρ. Raises `TapError` where relevance is lost on the way."""

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        outputs, leaf = entered.run(entered.still())
        return outputs, [leaf]

    check_relevance(entered.model, run)
    with ruled(entered.model, RELEVANCE):
        return gradient(entered)


def _slopes(outputs: torch.Tensor, leaf: torch.Tensor) -> Iterator[torch.Tensor]:
    """(rows, positions, width) float64 for each output, summed over rows: ∂/∂ what entered."""
    count = outputs.shape[-1]
    for i in range(count):
        (slope,) = torch.autograd.grad(outputs[:, i].sum(), leaf, retain_graph=i + 1 < count)
        yield slope.double()


SALIENCIES: dict[str, Saliency] = {
    "gradient": gradient,
    "integrated": integrated,
    "occlusion": occlusion,
    "deeplift": deeplift,
    "lrp": lrp,
}


def check(steps: int, baseline: str) -> None:
    """Raise `InputError` for options that can't be used."""
    if steps < 1:
        raise InputError(f"Integrated gradients need at least 1 step, not {steps}.")
    if baseline not in BASELINES:
        raise InputError(f"There is no baseline {baseline!r}; use {' or '.join(BASELINES)}.")
