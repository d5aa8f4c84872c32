"""Which tokens an answer rests on: gradient × input and integrated gradients of the token
embeddings.

With e_t the embedding of token t as it enters the stream (learned positions stay as they are) and m
the metric,

    gradient × input   a_t = e_t · ∂m/∂e_t    (Shrikumar et al. 2016, arXiv 1605.01713)
    integrated         a_t = (e_t − b_t) · ∫₀¹ ∂m/∂e_t (b + α(e − b)) dα
        (Sundararajan et al. 2017, arXiv 1703.01365)

The second is complete: Σ_t a_t = m(e) − m(b). With the zero baseline that is so in the limit only:
a model that normalises its stream changes all at once near 0, layer after layer, and no number of
steps sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import InputError
from interp.inputs.forward import forward
from interp.mechanics.metric import Judged, judged
from interp.mechanics.weights import main_sites
from interp.tasks.metric import logit_margin
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp.tasks.task import Instance
    from interp_hooks import HookedModel
    from interp_hooks.vocabulary import Vocabulary

BASELINES = ("mean", "zero")
#: tokens run together
BUDGET = 4096


@dataclass(frozen=True)
class Attribution:
    """Of one prompt: `gradient` and `integrated` (tokens,), signed, in logits; `metric` m(e);
    `baseline` m(b)."""

    gradient: np.ndarray
    integrated: np.ndarray
    metric: float
    baseline: float

    @property
    def gap(self) -> float:
        """|Σ_t a_t − (m(e) − m(b))| / |m(e) − m(b)| of the integrated gradients: how far they are
        from complete."""
        change = self.metric - self.baseline
        return abs(float(self.integrated.sum()) - change) / max(abs(change), 1e-12)


def attributions(
    model: Any,
    instance: Instance,
    steps: int = 32,
    baseline: str = "mean",
    vocabulary: Vocabulary | None = None,
) -> Attribution:
    """Gradient × input and integrated gradients of each token, for one problem's judged position.

    The first judged position.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        instance: the problem, of `Task.sample`.
        steps: nodes of the integral (Gauss–Legendre: they are dense near the baseline, where a norm
            makes the metric change fast).
        baseline: "mean", the mean embedding of the vocabulary, or "zero".
        vocabulary: `model.vocabulary()`, where it is at hand.

    Returns:
        An `Attribution`: both, (tokens,), signed, in logits.

    Raises:
        InputError: `steps` or `baseline` can't be used.
        TapError: the stream does not start with the embedding.

    Example:
        >>> problem = interp.tasks.get("ioi").sample(model.tokenizer, 1)[0]
        >>> found = interp.mechanics.attributions(model, problem)
        >>> found.integrated.shape == found.gradient.shape, found.gap < 0.1
        (True, True)
    """
    from interp.loading import load

    check(steps, baseline)
    hooked = load(model)
    vocab = hooked.vocabulary() if vocabulary is None else vocabulary
    batch = judged(hooked, [instance], first_only=True)
    embedding = vocab.embed(batch.input_ids)[0].detach()  # (tokens, d_model)
    if baseline == "zero":
        away = torch.zeros_like(embedding)
    else:
        away = (vocab.W_E.double().mean(0) * vocab.embed_scale).to(embedding).expand_as(embedding)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    alphas = torch.tensor(
        [1.0, 0.0, *((nodes + 1) / 2)], dtype=torch.float64, device=embedding.device
    )
    metrics, gradients = [], []
    for some in alphas.split(max(1, BUDGET // len(embedding))):
        shift = (some.to(embedding)[:, None, None] - 1) * (embedding - away)  # b + α(e − b) − e
        value, gradient = _gradient(hooked, batch, shift)
        metrics.append(value)
        gradients.append(gradient.double())
    metric, slope = (
        torch.cat(metrics),
        torch.cat(gradients),
    )  # (2 + steps,), (2 + steps, tokens, d_model)
    mean = torch.einsum("s,std->td", torch.tensor(weights / 2).to(slope), slope[2:])
    return Attribution(
        (embedding.double() * slope[0]).sum(-1).cpu().numpy(),
        ((embedding - away).double() * mean).sum(-1).cpu().numpy(),
        float(metric[0]),
        float(metric[1]),
    )


def check(steps: int, baseline: str) -> None:
    """Raise `InputError` for options that can't be used."""
    if steps < 1:
        raise InputError(f"Integrated gradients need at least 1 step, not {steps}.")
    if baseline not in BASELINES:
        raise InputError(f"There is no baseline {baseline!r}; use {' or '.join(BASELINES)}.")


def _gradient(
    model: HookedModel, batch: Judged, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows,) metrics and (rows, tokens, d_model) gradients with the stream's start moved by
    `shift`."""
    first = main_sites(model)[0].layer
    leaves: list[torch.Tensor] = []

    def write(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        if (place, layer) != ("pre", first):
            return None
        leaves.append((tensor.detach() + shift).requires_grad_())
        return leaves[-1]

    ids = batch.input_ids.expand(len(shift), -1)
    with torch.enable_grad(), model.capture_resid(write):
        out = forward(model, ids)
        logits = logits_of(out)
        column = int(batch.columns[0])
        metric = logit_margin(logits[:, column].double(), batch.right[0], batch.wrong[0])  # (rows,)
        (gradient,) = torch.autograd.grad(metric.sum(), leaves[0])
    return metric.detach(), gradient
