"""Edge pruning: a gate on every edge, or every head, learned so that the model's answers stay while
most gates shut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.divergence import divergence, log_probabilities
from interp.circuits.runs.edges import Graph, Stream
from interp.circuits.runs.gates import chance_open, gated_logits, hard_concrete, settled
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Pairs
from interp.circuits.runs.subgraph import Receivers, Subgraph
from interp.errors import InputError

OVER = ("auto", "edges", "heads")
#: edges beyond which "auto" prunes heads
MANY = 5000
#: log α at the start: gates open with probability .98
BEGIN = 2.5
#: share of the steps in which the target rises to `sparsity`
WARM = 0.5
#: gates not further from 0 or 1 count as shut or open
HALF = 0.5
#: draws of as many gates at random, to hold the open ones against
CONTROLS = 5

#: logits of a batch under gates, and whether they take a gradient
Run = Callable[[Pairs, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class EdgePruning(Method):
    """score(h) = the largest P(gate > 0) of an edge out of h, or of h itself, after gates were
    fitted to keep the model's answers with a share `sparsity` of them shut.

    Each gate is hard-concrete (Louizos et al. 2018): 0 and 1 have a probability of their own, and
    the parameter log α takes gradients. An edge whose gate is g carries g · (what its sender wrote)
    + (1 − g) · (what it wrote in the corrupted twin). Fitted by Adam is KL(clean model ‖ gated
    model) at the judged positions, plus λ₁ (t − s) + λ₂ (t − s)², s the expected share of shut
    gates, t the target, which rises to `sparsity` over the first half of `steps`; λ₁ and λ₂ rise by
    gradient ascent.

    `over`: gates on "edges", on whole "heads" (their z mixed with the twin's), or "auto", which
    takes edges up to 5 000 of them: every receiver then has a stream of its own. SmolLM2-135M has
    70 651, so its heads are gated. A note says what was taken, how many gates are open in the end,
    and how far the model with those alone is from the clean one, in nats, beside as many at random.

    Raises `TapError` for edges where `acdc` does; gates on heads need no edges.

    Misleads:
        One fit from one seed: of edges that do the same, which stays is chance, and another
        `sparsity` or seed keeps others. Scores crowd at 0 and 1. Few steps may end before the
        target is met; the note says what was.
    """

    sparsity: float = 0.9
    steps: int = 80
    rate: float = 0.3
    over: str = "auto"

    name = "edge_pruning"
    title = "Edge pruning"
    summary = "gates on edges or heads, learned to keep the answers while most shut"
    reading = (
        "How likely a gate on this head, or on an edge out of it, is to stay open when most have "
        "to shut."
    )
    formula = "max P(gate > 0), gates = argmin KL(clean ‖ gated) with E[shut] = sparsity"
    citation = "Bhaskar et al. 2024, arXiv 2406.16778, section 3"
    unit = "probability"
    presets = {"edges": {"over": "edges"}, "heads": {"over": "heads"}}

    def check(self) -> None:
        self.choice("over", *OVER)
        self.at_least(1, "steps")
        if not (isinstance(self.sparsity, int | float) and 0 < self.sparsity < 1):
            raise InputError(
                f"sparsity of {self.name} is a share above 0 and below 1, not {self.sparsity!r}."
            )
        if not (isinstance(self.rate, int | float) and 0 < self.rate < np.inf):
            raise InputError(f"rate of {self.name} is a number above 0, not {self.rate!r}.")

    def find(self, runs: PairedRuns) -> Found:
        if self.over == "heads":
            return self._heads(runs, "")
        if self.over == "auto" and (count := _edges(runs)) > MANY:
            return self._heads(runs, f" ({count:,} edges are too many for gates of their own)")
        return self._edges(runs)

    def _heads(self, runs: PairedRuns, why: str) -> Found:
        batches = runs.batches(gradients=True)
        stand_ins: dict[int, Mapping[int, torch.Tensor | float]] = {
            pairs.rows.start: runs.stand_ins(pairs, "resample") for pairs in batches
        }

        def run(pairs: Pairs, gates: torch.Tensor) -> torch.Tensor:
            return gated_logits(runs, pairs, gates, stand_ins[pairs.rows.start])

        alpha, note = self._fit(runs, batches, run, len(runs.heads), "heads" + why)
        return Found(_numbers(chance_open(alpha)), notes=[note])

    def _edges(self, runs: PairedRuns) -> Found:
        stream = Stream(runs)
        graph, receivers = stream.graph, Receivers(runs, stream)
        batches = runs.batches(gradients=True)
        subgraphs = {
            pairs.rows.start: Subgraph(stream, receivers, pairs, "resample") for pairs in batches
        }
        allowed = torch.from_numpy(graph.allowed).to(runs.model.device)

        def run(pairs: Pairs, gates: torch.Tensor) -> torch.Tensor:
            shut = torch.zeros(graph.allowed.shape, device=gates.device).to(gates)
            shut = shut.masked_scatter(allowed, 1 - gates)[None]
            if gates.requires_grad:
                runs.again(pairs)
            with torch.set_grad_enabled(gates.requires_grad):
                return subgraphs[pairs.rows.start].live(shut, runs.layers[0])[0]

        alpha, note = self._fit(runs, batches, run, int(graph.allowed.sum()), "edges")
        scores = np.zeros(graph.allowed.shape)
        scores[graph.allowed] = _numbers(chance_open(alpha))
        stays = np.zeros_like(graph.allowed)
        stays[graph.allowed] = _numbers(settled(alpha)) > HALF
        return Found(
            scores[graph.heads].max(1),
            edges=graph.table(scores, graph.allowed & stays),
            notes=[note],
        )

    def _fit(
        self, runs: PairedRuns, batches: list[Pairs], run: Run, gates: int, what: str
    ) -> tuple[torch.Tensor, str]:
        """(log α (gates,), a note of what came out)."""
        device = runs.model.device
        draw = torch.Generator().manual_seed(runs.seed)
        alpha = torch.full((gates,), BEGIN, device=device)
        # the paper's gates begin alike; a little noise parts those with the same gradient
        alpha += 0.01 * torch.randn(gates, generator=draw).to(device)
        alpha.requires_grad_()
        prices = torch.zeros(2, device=device, requires_grad=True)
        adam = torch.optim.Adam([alpha], lr=float(self.rate))
        rising = torch.optim.Adam([prices], lr=float(self.rate), maximize=True)
        with torch.no_grad():
            wanted = {
                pairs.rows.start: [
                    log_probabilities(rows)
                    for rows in pairs.judged(run(pairs, torch.ones(gates, device=device)))
                ]
                for pairs in batches
            }
        runs.expect(self.steps)
        for step in range(self.steps):
            target = float(self.sparsity) * min(1.0, (step + 1) / (WARM * self.steps))
            adam.zero_grad()
            rising.zero_grad()
            sampled = hard_concrete(alpha, draw)
            leaf = sampled.detach().requires_grad_()
            slope = torch.zeros_like(leaf)
            for pairs in batches:
                loss = divergence(wanted[pairs.rows.start], pairs, run(pairs, leaf))
                slope += torch.autograd.grad(loss, leaf)[0] / len(runs.prompts)
            missing = target - (1 - chance_open(alpha).mean())
            price = prices[0] * missing + prices[1] * missing**2
            ((sampled * slope).sum() + price).backward()
            adam.step()
            rising.step()
            runs.step(self.title)
        alpha = alpha.detach()
        return alpha, self._told(runs, batches, run, wanted, alpha, what)

    def _told(
        self,
        runs: PairedRuns,
        batches: list[Pairs],
        run: Run,
        wanted: dict[int, list[torch.Tensor]],
        alpha: torch.Tensor,
        what: str,
    ) -> str:
        final = (settled(alpha) > HALF).to(alpha)
        draw = torch.Generator().manual_seed(runs.seed)

        def far(gates: torch.Tensor) -> float:
            with torch.no_grad():
                each = [divergence(wanted[p.rows.start], p, run(p, gates)) for p in batches]
            return float(torch.stack(each).sum()) / len(runs.prompts)

        others = [
            far(final[torch.randperm(len(final), generator=draw).to(final.device)])
            for _ in range(CONTROLS)
        ]
        count = int(final.sum())
        return (
            f"Edge pruning: gates on {what}; {count} of {len(final)} are open in the end "
            f"({1 - count / len(final):.0%} shut, {float(self.sparsity):.0%} asked for), and with "
            f"these alone the answers are {far(final):.3g} nats from the model's; with as many "
            f"drawn at random {min(others):.3g} to {max(others):.3g} ({CONTROLS} draws)."
        )


def _edges(runs: PairedRuns) -> int:
    """How many edges a model of this size has."""
    mlps = dict.fromkeys(runs.layers, True)
    return int(Graph.of(runs, parallel=False, mlps=mlps).allowed.sum())


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
