"""Heads by how much they look at what the task is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.paired_runs import PairedRuns
from interp_hooks.question import Question, SiteQuestion
from interp_hooks.weight_rows import WeightRows

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class AttentionWeight(Method):
    """score(h) = mean over the clean prompts of Σ A[last judged position, k] over the tokens k in
    which the clean prompt differs from the corrupted one: how much the head looks at what decides
    the answer, with no gradient and no ablation.

    Misleads:
        Looking is not doing: what the head moves, and whether anything reads it, is not asked. It
        sees only heads that look from the end.
    """

    name = "attention_weight"
    title = "Attention to what differs"
    summary = "how much a head looks at the tokens that decide the answer"
    reading = "The weight that the last position gives to the tokens that decide the answer."
    formula = "mean Σ over k with x_k ≠ x'_k of A[end, k]"
    citation = "control"

    def shuffles(self) -> tuple[str, ...]:
        return ()

    def find(self, runs: PairedRuns) -> Found:
        total = np.zeros(len(runs.heads))
        batches = runs.batches()
        runs.expect(len(batches))
        for pairs in batches:
            ends = pairs.ends()  # (batch,)
            differs = ((pairs.clean != pairs.corrupted) & pairs.mask.bool()).float()
            seen: dict[int, torch.Tensor] = {}

            def question(
                site: Site,
                ends: torch.Tensor = ends,
                differs: torch.Tensor = differs,
                seen: dict[int, torch.Tensor] = seen,
            ) -> Question:
                if site.layer not in runs.sites or site != runs.sites[site.layer]:
                    return Question()

                def take(call: AttentionCall, start: int, a: torch.Tensor) -> None:
                    first = call.mask.q_start + start
                    rows = torch.arange(first, first + a.shape[2], device=a.device)
                    mine = (rows == ends.to(a.device)[:, None]).float()  # (batch, rows)
                    at = torch.einsum("bhqk,bq->bhk", a, mine)
                    weight = torch.einsum("bhk,bk->h", at, differs[:, : a.shape[3]].to(a))
                    seen[site.layer] = seen.get(site.layer, 0) + weight

                return Question(weights=WeightRows(take))

            with runs.model.watch(SiteQuestion(choose=question), lambda stats: None, "after"):
                runs.run(pairs)
            total += torch.cat([seen[layer] for layer in runs.layers]).double().cpu().numpy()
            runs.step(self.title)
        return Found(total / len(runs.prompts))
