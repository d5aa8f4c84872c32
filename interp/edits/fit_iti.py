"""Inference-time intervention from two lists of texts: heads by how well a probe of their output
tells the lists apart, and the direction between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.edits.shift_heads import ShiftHeads
from interp.errors import InputError
from interp.inputs.forward import forward
from interp.inputs.text import check_seed
from interp.support.checked import whole_number
from interp_hooks.heads import Head
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats

if TYPE_CHECKING:
    from interp.model import Model

#: share of all heads that are moved unless told otherwise: 48 of LLaMA-7B's 1,024
SHARE = 48 / 1024
FOLDS, STEPS, RIDGE = 5, 12, 1.0
#: texts that are run at once
BATCH = 32


@dataclass(frozen=True)
class ProbedHeads:
    """What probes of heads told.

    Attributes:
        heads: in order.
        accuracy: (heads,) of a logistic probe on texts that it was not fitted on, mean of five
            folds.
        likelihood: (heads,) its mean log-probability of their kinds.
        direction: (heads, d_head) θ, the unit vector from the mean of the one list to the other's.
        spread: (heads,) σ, the standard deviation of all texts along θ.
    """

    heads: tuple[Head, ...]
    accuracy: np.ndarray
    likelihood: np.ndarray
    direction: torch.Tensor
    spread: torch.Tensor

    def strongest(self, k: int) -> list[int]:
        """The places of the `k` most accurate heads, the best first; among equals those that are
        surer."""
        return [int(i) for i in np.lexsort((-self.likelihood, -self.accuracy))[:k]]


def probe_heads(
    model: Model, towards: Sequence[str], away: Sequence[str], seed: int = 0
) -> ProbedHeads:
    """Probes every head's z at the last token of texts of two kinds.

    Args:
        model: the model.
        towards: texts of the kind that is wanted.
        away: of the other.
        seed: of the folds.

    Raises:
        InputError: fewer than five texts of a kind.

    Example:
        >>> from interp.edits.fit_iti import probe_heads
        >>> good = [f"the {x} was good" for x in ("cat", "dog", "cup", "pen", "box")]
        >>> bad = [f"the {x} was bad" for x in ("cat", "dog", "cup", "pen", "box")]
        >>> probe_heads(model, good, bad).accuracy.shape
        (32,)
    """
    check_seed(seed)
    for texts in (towards, away):
        if isinstance(texts, str) or len(texts) < FOLDS:
            raise InputError(
                f"Probes need at least {FOLDS} texts of each of two kinds, in two lists."
            )
    heads, z = last_outputs(model, [*towards, *away])  # (texts, heads, d) by layer, joined
    labels = torch.tensor([1.0] * len(towards) + [0.0] * len(away), dtype=torch.float64)
    found = [_probed(by_layer.double(), labels, seed) for by_layer in z]
    accuracy, likelihood, direction, spread = zip(*found, strict=True)
    return ProbedHeads(
        heads,
        torch.cat(accuracy).numpy(),
        torch.cat(likelihood).numpy(),
        torch.cat(direction),
        torch.cat(spread),
    )


def iti_for(
    model: Any,
    towards: Sequence[str],
    away: Sequence[str],
    k: int | None = None,
    strength: float = 15.0,
    seed: int = 0,
) -> ShiftHeads:
    """The edit of inference-time intervention for two lists of texts.

    Li et al. 2023, arXiv 2306.03341, §3. A logistic probe of each head's z at the last token tells
    the lists apart; the `k` heads whose probes do best on texts that they were not fitted on are
    moved from the one mean towards the other, z_h ← z_h + α σ_h θ_h, at every token. The paper
    splits its questions once; here the accuracy is the mean of five folds, and equals are told
    apart by how sure their probes are.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        towards: texts of the kind that is wanted: true answers, polite ones.
        away: of the other kind, otherwise as alike as can be.
        k: heads; None for the paper's share, 48 of 1,024.
        strength: α; 15 in the paper. What is best differs from model to model.
        seed: of the folds.

    Returns:
        `ShiftHeads` with b_h = σ_h θ_h.

    Raises:
        InputError: fewer than five texts of a kind, or more heads than there are.

    Misleads:
        Probes that tell texts apart need not be what moves them: many heads read what few write.
        Beside it belong as many random heads, moved along their own directions just as far.

    Example:
        >>> good = [f"the {x} was good" for x in ("cat", "dog", "cup", "pen", "box")]
        >>> bad = [f"the {x} was bad" for x in ("cat", "dog", "cup", "pen", "box")]
        >>> edit = interp.edits.iti_for(model, good, bad, k=2)
        >>> len(edit.heads), edit.strength
        (2, 15.0)
    """
    from interp.loading import load

    hooked = load(model)
    probed = probe_heads(hooked, towards, away, seed)
    count = max(1, round(SHARE * len(probed.heads))) if k is None else whole_number(k, "k of ITI")
    if not 1 <= count <= len(probed.heads):
        raise InputError(f"ITI moves 1 to {len(probed.heads)} heads of {hooked.name}, not {count}.")
    return shift_along(probed, probed.strongest(count), strength)


def shift_along(probed: ProbedHeads, chosen: Sequence[int], strength: float) -> ShiftHeads:
    """The edit that moves these heads, by place, along their directions."""
    directions = {
        str(probed.heads[i]): (probed.spread[i] * probed.direction[i]).float() for i in chosen
    }
    return ShiftHeads(directions, strength)


@torch.no_grad()
def last_outputs(model: Model, texts: Sequence[str]) -> tuple[tuple[Head, ...], list[torch.Tensor]]:
    """(heads, per layer (texts, heads, d)) z at the last token of each text."""
    kept: dict[int, list[torch.Tensor]] = {}

    def note(stats: LayerStats) -> None:
        if stats.site.is_main:
            assert stats.z is not None
            kept.setdefault(stats.site.layer, []).append(stats.z[:, -1].detach().cpu())

    with model.clean(), model.watch(Question(z=True), note):
        for start in range(0, len(texts), BATCH):
            rows = model.tokens(texts[start : start + BATCH])  # padded on the left
            forward(model, rows["input_ids"], rows["attention_mask"], keep=1)
    layers = sorted(kept)
    z = [torch.cat(kept[layer]) for layer in layers]
    heads = tuple(
        Head(layer, h) for layer, some in zip(layers, z, strict=True) for h in range(some.shape[1])
    )
    return heads, z


def _probed(
    z: torch.Tensor, labels: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """((heads,) accuracy and likelihood, (heads, d) θ, (heads,) σ) of one layer's (texts, heads,
    d)."""
    z = z.transpose(0, 1)  # (heads, texts, d)
    order = np.random.default_rng(seed).permutation(len(labels))
    # folds with as many texts of each kind as can be
    fold = torch.empty(len(labels), dtype=torch.long)
    for kind in (0, 1):
        members = [i for i in order if int(labels[i]) == kind]
        fold[members] = torch.arange(len(members)) % FOLDS
    right = torch.zeros(z.shape[0], len(labels), dtype=torch.float64)
    sure = torch.zeros_like(right)
    for part in range(FOLDS):
        held = fold == part
        logits = _logistic(z[:, ~held], labels[~held], z[:, held])
        right[:, held] = ((logits > 0) == (labels[held] > 0.5)).double()
        sign = 2 * labels[held] - 1
        sure[:, held] = torch.nn.functional.logsigmoid(sign * logits)
    gap = z[:, labels == 1].mean(1) - z[:, labels == 0].mean(1)
    direction = gap / gap.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    spread = torch.einsum("hnd,hd->hn", z, direction).std(1)
    return right.mean(1), sure.mean(1), direction, spread


def _logistic(x: torch.Tensor, labels: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """(heads, held texts) logits of L2-regularised logistic regressions, one a head, by Newton's
    steps: min Σ log(1 + e^(−y w·x)) + ‖w‖²/2, the intercept free, on standardised x."""
    mean, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True).clamp_min(1e-12)

    def design(rows: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(*rows.shape[:2], 1, dtype=rows.dtype)
        return torch.cat([(rows - mean) / scale, ones], -1)  # (heads, texts, d + 1)

    a, (heads, _, width) = design(x), (x.shape[0], x.shape[1], x.shape[2] + 1)
    penalty = torch.full((width,), RIDGE, dtype=x.dtype)
    penalty[-1] = 1e-6
    w = torch.zeros(heads, width, dtype=x.dtype)
    for _ in range(STEPS):
        p = torch.einsum("hnd,hd->hn", a, w).sigmoid()
        gradient = torch.einsum("hnd,hn->hd", a, p - labels) + penalty * w
        hessian = torch.einsum("hnd,hn,hne->hde", a, p * (1 - p), a) + torch.diag(penalty)
        w = w - torch.linalg.solve(hessian, gradient)
    return torch.einsum("hnd,hd->hn", design(held), w)
