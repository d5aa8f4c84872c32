"""Importance of a head, estimated from one backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from interp.edits.scale_heads import ScaleHeads
from interp.inputs.forward import forward
from interp.scores.importance import LENGTH, heads
from interp.scores.score import ModelScore
from interp_hooks.heads import Head
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp.inputs.pace import Pace
    from interp.probes.settings import Settings
    from interp_hooks.model import HookedModel


class ImportanceGradient(ModelScore):
    """E_x |∂L(x) / ∂ξ_h| at ξ = 1, ξ_h a factor on z_h and L the mean next-token loss of a text.

    The first-order estimate of |loss(z_h := 0) − loss|, which `importance` measures in a pass a
    head: one forward and one backward a text serve all heads. The absolute value is taken text by
    text. Michel et al. divide by the L2 norm over a layer's heads for pruning; these are not
    divided, so that layers can be compared.

    Misleads:
        It is of first order: a saturated head has a small gradient and may matter. And it is a
        size, which does not tell heads that help from heads that harm.
    """

    name = "importance_gradient"
    title = "Importance, estimated"
    reading = (
        "A first-order estimate of how much the next-token loss changes without this head, from "
        "gradients; `importance` measures it, in a pass a head."
    )
    formula = "E_x |∂L(x) / ∂ξ_h|, z_h ← ξ_h z_h, at ξ = 1"
    citation = "Michel et al. 2019, arXiv 1905.10650, section 4.1"
    unit = "nats"
    high = None
    length = LENGTH
    probe = "own"
    passes = "1 forward and backward a sample"

    def cost(self, model: HookedModel, settings: Settings) -> int:
        return settings.samples * min(LENGTH, settings.context)

    def seconds(self, model: HookedModel, settings: Settings, pace: Pace) -> float:
        length = min(LENGTH, settings.context)
        return pace.of("gradient", lambda ids: slopes(model, ids), settings.samples, length)

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return settings.samples

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        length = min(LENGTH, settings.context)
        rows = settings.rows(model.tokenizer, length)
        by_head: dict[Head, list[float]] = {h: [] for h in heads(model)}
        for n, row in enumerate(rows, 1):
            for head, slope in slopes(model, torch.tensor([row])).items():
                by_head[head].append(abs(slope))
            yield list(by_head.items()) if n == len(rows) else []


def slopes(model: HookedModel, ids: torch.Tensor) -> dict[Head, float]:
    """head → ∂L/∂ξ_h of the mean next-token loss of one text, ids (1, tokens)."""
    gains = {h: torch.ones((), device=model.device, requires_grad=True) for h in heads(model)}
    with torch.enable_grad(), model.edit(ScaleHeads(gains)):
        logits = logits_of(forward(model, ids))[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device))
        found = torch.autograd.grad(loss, list(gains.values()), allow_unused=True)
    # a head that the loss does not pass has no gradient
    return {h: 0.0 if g is None else float(g) for h, g in zip(gains, found, strict=True)}
