"""The constant that a head's output is best replaced by: what an ablation takes away is then only
what no constant can give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from interp.circuits.runs.prompts import Pairs, Prompts

if TYPE_CHECKING:
    from interp_hooks.activations import Activations, Hook
    from interp_hooks.model import HookedModel


class Runs(Protocol):
    """What is asked of the runs of prompts: `paired_runs.PairedRuns`."""

    @property
    def layers(self) -> list[int]: ...
    @property
    def prompts(self) -> Prompts: ...
    @property
    def model(self) -> HookedModel: ...
    def means(self) -> dict[int, torch.Tensor]: ...
    def expect(self, steps: int) -> None: ...
    def step(self, what: str) -> None: ...
    def logits(
        self, pairs: Pairs, ids: torch.Tensor, write: Hook | None = None, *, copies: int = 1
    ) -> tuple[torch.Tensor, Activations]: ...


#: steps of Adam from the mean, and its rate as a share of the spread of z
STEPS, RATE = 40, 0.1


def optimal(runs: Runs) -> dict[int, torch.Tensor]:
    """layer → (2, heads, d_head): for each head, and for the prompts of even and of odd number, the
    constant a fitted on the *other* prompts so that replacing its z by a at every position changes
    the model's answers least:

        a* = argmin_a E KL(p(x) ‖ p(x; z_h := a)) at the judged positions

    (Li and Janson 2024, arXiv 2409.09951, optimal ablation), by Adam from the mean of z. The heads
    of a layer are fitted side by side, each in copies of the prompts of its own.
    """
    means = runs.means()
    constants: dict[int, torch.Tensor] = {}
    runs.expect(2 * len(runs.layers) * STEPS)
    for layer in runs.layers:
        halves = []
        for half in (1, 0):  # what is fitted on odd prompts serves even ones
            halves.append(_fitted(runs, layer, half, means[layer]))
        constants[layer] = torch.stack(halves)
    return constants


def _fitted(runs: Runs, layer: int, half: int, mean: torch.Tensor) -> torch.Tensor:
    """(heads, d_head) of one layer, fitted on the prompts whose number modulo 2 is `half`."""
    heads = len(mean)
    scale = float(mean.norm(dim=-1).mean().clamp_min(1e-3)) / mean.shape[-1] ** 0.5
    constant = mean.clone().float().requires_grad_()
    adam = torch.optim.Adam([constant], RATE * scale)
    batches = [(pairs, _answers(runs, pairs)) for pairs in _half(runs, half, heads)]
    for _ in range(STEPS):
        adam.zero_grad()
        for pairs, wanted in batches:
            loss = _loss(runs, pairs, wanted, layer, constant)
            (slope,) = torch.autograd.grad(loss, constant)
            constant.grad = slope if constant.grad is None else constant.grad + slope
        adam.step()
        runs.step("optimal constants")
    return constant.detach()


def _half(runs: Runs, half: int, copies: int) -> Iterator[Pairs]:
    instances = runs.prompts.instances
    mine = instances[half::2] or instances
    few = replace(runs.prompts, instances=mine)
    yield from few.batches(runs.model, max(1, 2048 // copies))


@torch.no_grad()
def _answers(runs: Runs, pairs: Pairs) -> list[torch.Tensor]:
    """(judged positions, vocabulary) log-probabilities of the untouched model, a prompt each."""
    logits, _ = runs.logits(pairs, pairs.clean)
    return [rows.float().log_softmax(-1) for rows in pairs.judged(logits)]


def _loss(
    runs: Runs,
    pairs: Pairs,
    wanted: list[torch.Tensor],
    layer: int,
    constant: torch.Tensor,
) -> torch.Tensor:
    """Σ over heads and prompts of the divergence, each head replaced in a copy of its own."""
    heads, batch = len(constant), len(pairs.rows)

    def write(place: str, at: int, z: torch.Tensor) -> torch.Tensor | None:
        if place != "z" or at != layer:
            return None
        copies = z.unflatten(0, (heads, batch))  # (heads, batch, tokens, heads, d)
        own = torch.eye(heads, device=z.device, dtype=torch.bool)[:, None, None, :, None]
        return torch.where(own, constant.to(z)[None, None, None], copies).flatten(0, 1)

    with torch.enable_grad():
        logits, _ = runs.logits(pairs, pairs.clean, write, copies=heads)
        total = constant.new_zeros(())
        for rows in logits.unflatten(0, (heads, batch)):
            for found, aim in zip(pairs.judged(rows), wanted, strict=True):
                said = found.float().log_softmax(-1)
                total = total + (aim.exp() * (aim - said)).sum(-1).mean()
    return total / batch
