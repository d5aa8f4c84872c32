"""Causal head gating: a gate in [0, 1] on every head, fitted twice, pushed open and pushed shut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.gates import gated_logits
from interp.circuits.runs.paired_runs import MODES, PairedRuns
from interp.circuits.runs.prompts import Pairs
from interp.errors import InputError

#: gates begin at σ(2) = .88
BEGIN = 2.0
#: a gate beyond counts as open
OPEN = 0.5
#: heads that a note names
NAMED = 8
CLASSES = ("facilitating", "interfering", "irrelevant")


@dataclass(frozen=True)
class HeadGating(Method):
    """score(h) = max(G⁻_h, 1 − G⁺_h), effect(h) = G⁻_h − (1 − G⁺_h), where G⁻ and G⁺ are gates
    fitted to the prompts, one pushed shut and one pushed open.

    A gate g = σ(θ) in [0, 1] makes a head's z g · z + (1 − g) · stand-in, at every position. All
    gates are fitted together, by Adam on the mean over prompts of −log P(right answer), plus
    `price` · Σ g (G⁻) or minus it (G⁺). A head that stays open though it costs `price` nats is
    *facilitating*; one that shuts though open pays is *interfering*; the rest, open only where that
    pays, are *irrelevant*. Notes tell how many heads each class has, and the first of them.

    `mode`: the stand-in, 0 as in the paper ("zero"), or as in `head_ablation`. The paper pushes the
    gates' logits; here the gates themselves are pushed, so that `price` is in nats a head.

    It takes 2 · `steps` forwards and backwards.

    Misleads:
        Gates are fitted together: of heads that do the same, one may stay and the others go. The
        fit is to these prompts and can only be as good as its steps; heads may still be on their
        way. All heads below `price` nats look alike, and a larger price calls fewer facilitating.
    """

    steps: int = 40
    rate: float = 0.3
    price: float = 0.005
    mode: str = "zero"

    name = "head_gating"
    title = "Causal head gating"
    summary = "soft gates on all heads, fitted open and shut: what helps, hurts, does nothing"
    reading = (
        "How far this head stays open though shutting pays, or shuts though opening pays, of 1."
    )
    effect_reading = (
        "How far the head stays open though shutting pays, less how far it shuts though opening "
        "pays: near 1 it helps, near −1 it hurts, near 0 neither."
    )
    formula = "max(G⁻, 1 − G⁺), G± = argmin_g E[−log P(answer; z_h := g z_h + …)] ∓ price · Σ g"
    citation = "Nam et al. 2025, arXiv 2505.13737"
    unit = "share"
    presets = {"zero": {"mode": "zero"}, "mean": {"mode": "mean"}, "resample": {"mode": "resample"}}

    def check(self) -> None:
        self.choice("mode", *MODES)
        self.at_least(1, "steps")
        for name in ("rate", "price"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < np.inf):
                raise InputError(f"{name} of {self.name} is a number above 0, not {value!r}.")

    def find(self, runs: PairedRuns) -> Found:
        batches = runs.batches(gradients=True)
        stand_ins = [runs.stand_ins(pairs, self.mode) for pairs in batches]
        runs.expect(2 * self.steps)
        shut, before, after = self._fit(runs, batches, stand_ins, self.price)
        opened, _, best = self._fit(runs, batches, stand_ins, -self.price)
        note = (
            f"Head gating: −log P(answer) is {before:.3g} with all gates open, {after:.3g} with "
            f"those pushed shut and {best:.3g} with those pushed open."
        )
        return Found(
            np.maximum(shut, 1 - opened),
            shut - (1 - opened),
            notes=[note, self._told(runs, shut, opened)],
        )

    def _fit(
        self,
        runs: PairedRuns,
        batches: list[Pairs],
        stand_ins: list[Mapping[int, torch.Tensor | float]],
        price: float,
    ) -> tuple[np.ndarray, float, float]:
        """(gates (heads,) float64, loss of the answer with all open, and at the end)."""
        theta = torch.full((len(runs.heads),), BEGIN, device=runs.model.device, requires_grad=True)
        adam = torch.optim.Adam([theta], lr=float(self.rate))
        n, found = len(runs.prompts), 0.0
        ones = torch.ones(len(runs.heads), device=runs.model.device)
        before = self._loss(runs, batches, stand_ins, ones, None) / n
        for _ in range(self.steps):
            adam.zero_grad()
            gates = theta.sigmoid()
            slope = torch.zeros_like(theta)
            self._loss(runs, batches, stand_ins, gates.detach(), slope)
            (gates * (slope / n + price)).sum().backward()
            adam.step()
            runs.step(self.title)
        gates = theta.detach().sigmoid()
        found = self._loss(runs, batches, stand_ins, gates, None) / n
        return gates.double().cpu().numpy(), before, found

    @staticmethod
    def _loss(
        runs: PairedRuns,
        batches: list[Pairs],
        stand_ins: list[Mapping[int, torch.Tensor | float]],
        gates: torch.Tensor,
        slope: torch.Tensor | None,
    ) -> float:
        """Σ over prompts of −log P(answer) under these gates; its gradient is added to `slope`."""
        total = 0.0
        for pairs, given in zip(batches, stand_ins, strict=True):
            leaf = gates.detach().clone().requires_grad_(slope is not None)
            with torch.set_grad_enabled(slope is not None):
                loss = answer_loss(pairs, gated_logits(runs, pairs, leaf, given)).sum()
            if slope is not None:
                (g,) = torch.autograd.grad(loss, leaf)
                slope += g
            total += float(loss.detach())
        return total

    def _told(self, runs: PairedRuns, shut: np.ndarray, opened: np.ndarray) -> str:
        classes = classified(shut, opened)
        strength = {"facilitating": shut, "interfering": 1 - opened}
        parts = []
        for name in CLASSES:
            rows = np.nonzero(classes == name)[0]
            part = f"{len(rows)} {name}"
            if name in strength and len(rows):
                first = rows[np.argsort(-strength[name][rows], kind="stable")][:NAMED]
                more = ", …" if len(rows) > NAMED else ""
                part += f" ({', '.join(str(runs.heads[i]) for i in first)}{more})"
            parts.append(part)
        return f"Head gating: {'; '.join(parts)}."


def classified(shut: np.ndarray, opened: np.ndarray) -> np.ndarray:
    """(heads,): the class of each head by its gates pushed shut and pushed open."""
    helps, hurts = shut > OPEN, opened <= OPEN
    return np.where(hurts, CLASSES[1], np.where(helps, CLASSES[0], CLASSES[2]))


def answer_loss(pairs: Pairs, logits: torch.Tensor) -> torch.Tensor:
    """(batch,): mean over the judged positions of −log P(any right token)."""
    losses = []
    for rows, instance in zip(pairs.judged(logits), pairs.instances, strict=True):
        logs = rows.float().log_softmax(-1)
        each = [-logs[i, list(tokens)].logsumexp(-1) for i, tokens in enumerate(instance.accept)]
        losses.append(torch.stack(each).mean())
    return torch.stack(losses)
