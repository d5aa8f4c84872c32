"""Which tokens an answer rests on: the methods of `interp.mechanics.saliency`, of the token
embeddings as they enter the stream (learned positions stay as they are).

With the zero baseline integrated gradients are complete in the limit only: a model that normalises
its stream changes all at once near 0, layer after layer, and no number of steps sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import TapError
from interp.inputs.forward import forward
from interp.mechanics.metric import Judged, judged
from interp.mechanics.saliency import SALIENCIES, Entered, check
from interp.mechanics.weights import main_sites
from interp.tasks.metric import logit_margin
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp.tasks.task import Instance
    from interp_hooks import HookedModel
    from interp_hooks.vocabulary import Vocabulary


@dataclass(frozen=True)
class Attribution:
    """Of one prompt, signed, in logits: an array (tokens,) a method; `metric` m(x), `baseline`
    m(b).

    `refused` says why a method is missing, whose array is then None.
    """

    gradient: np.ndarray
    integrated: np.ndarray
    metric: float
    baseline: float
    occlusion: np.ndarray | None = None
    deeplift: np.ndarray | None = None
    lrp: np.ndarray | None = None
    refused: dict[str, str] | None = None

    @property
    def gap(self) -> float:
        """|Σ_t a_t − (m(x) − m(b))| / |m(x) − m(b)| of the integrated gradients: how far they are
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
    """What each token adds to the answer's margin at a problem's first judged position, five ways.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        instance: the problem, of `Task.sample`.
        steps: nodes of the integral (Gauss–Legendre: they are dense near the baseline, where a norm
            makes the metric change fast).
        baseline: "mean", the mean embedding of the vocabulary, or "zero".
        vocabulary: `model.vocabulary()`, where it is at hand.

    Returns:
        An `Attribution`: an array (tokens,) a method, signed, in logits. `deeplift` and `lrp` are
        None where a part of the model is of a kind that they don't know.

    Raises:
        InputError: `steps` or `baseline` can't be used.
        TapError: the stream does not start with the embedding.

    Example:
        >>> problem = interp.tasks.get("ioi").sample(model.tokenizer, 1)[0]
        >>> found = interp.mechanics.attributions(model, problem)
        >>> found.integrated.shape == found.deeplift.shape, found.gap < 0.1
        (True, True)
        >>> bool(abs(found.deeplift.sum() - (found.metric - found.baseline)) < 1e-3)
        True
    """
    from interp.loading import load

    check(steps, baseline)
    hooked = load(model)
    vocab = hooked.vocabulary() if vocabulary is None else vocabulary
    entered = _entered(hooked, judged(hooked, [instance], first_only=True), baseline, vocab)
    found: dict[str, np.ndarray | None] = {}
    refused = {}
    for name, method in SALIENCIES.items():
        try:
            found[name] = method(entered, steps)[0].cpu().numpy()
        except TapError as reason:
            if name not in ("deeplift", "lrp"):
                raise
            found[name], refused[name] = None, str(reason)
    ends = entered.outputs(torch.stack([entered.still()[0], -entered.difference]))[:, 0]
    return Attribution(
        metric=float(ends[0]),
        baseline=float(ends[1]),
        refused=refused or None,
        **found,  # type: ignore[arg-type]
    )


def _entered(model: HookedModel, batch: Judged, baseline: str, vocab: Vocabulary) -> Entered:
    """The embeddings of one prompt, and the margin of its judged position."""
    embedding = vocab.embed(batch.input_ids)[0].detach()  # (tokens, d_model)
    away = torch.zeros_like(embedding)
    if baseline == "mean":
        away = away + (vocab.W_E.double().mean(0) * vocab.embed_scale).to(embedding)
    first, column = main_sites(model)[0].layer, int(batch.columns[0])

    def run(shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaves: list[torch.Tensor] = []

        def write(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
            if (place, layer) != ("pre", first):
                return None
            leaves.append((tensor.detach() + shift).requires_grad_())
            return leaves[-1]

        with torch.enable_grad(), model.capture_resid(write):
            out = forward(model, batch.input_ids.expand(len(shift), -1))
        logits = logits_of(out)[:, column]  # (rows, vocabulary)
        margin = logit_margin(logits.double(), batch.right[0], batch.wrong[0])  # (rows,)
        return margin[:, None], leaves[0]

    return Entered(model, embedding, away, run)
