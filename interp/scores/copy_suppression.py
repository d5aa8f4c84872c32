"""Heads that lower what they look at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from interp.scores.score import ModelScore
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.inputs.pace import Pace
    from interp.probes.settings import Settings
    from interp_hooks.model import HookedModel

#: tokens of the vocabulary that are looked at
TOKENS = 100
#: among so many that a head lowers most a token must be
LOWEST = 10


class CopySuppression(ModelScore):
    """The share of tokens that are among the ten which a head's OV circuit lowers most when it
    attends to them.

    Of 100 tokens drawn from the vocabulary, each as the stream after the first block of a prompt of
    it alone.

    Misleads:
        It is read from weights: what the head would write, not what it attends to. A head that
        lowers what it sees may do so to hedge, or because others copy too much; ablate it to see.
    """

    name = "copy_suppression"
    title = "Copy suppression"
    reading = (
        "The share of tokens that the head lowers more than almost any other when it attends to "
        "them; from weights alone. By chance ten of the vocabulary."
    )
    formula = "P(own logit among the 10 lowest of x V O W_U)"
    citation = "McDougall et al. 2023, arXiv 2310.04625"
    probe = "own"
    passes = "one of single tokens"

    def cost(self, model: HookedModel, settings: Settings) -> int:
        from interp.mechanics.weights import main_sites

        for site in main_sites(model):
            weights = model.head_weights(site.layer, site.tower)
            _ = weights.W_V, weights.W_O
        return min(TOKENS, model.vocabulary().W_U.shape[1])

    def seconds(self, model: HookedModel, settings: Settings, pace: Pace) -> float:
        from interp.mechanics.ov_qk import seconds_of_folding
        from interp.support.progress import timed

        W_U = model.vocabulary().W_U
        rows = torch.ones(8, W_U.shape[0], dtype=torch.float32, device=W_U.device)
        piece = W_U[:, :4096].float()
        each = timed(lambda: rows @ piece) * W_U.shape[1] / piece.shape[1] / 8
        return seconds_of_folding(model) + each * TOKENS * len(model.heads)

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return model.n_layers

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        from interp.mechanics.ov_qk import drawn
        from interp.mechanics.ov_words import raised

        ids = drawn(model, TOKENS, settings.seed)
        for site, logits in raised(model, ids.tolist()):  # (heads, tokens, vocabulary)
            own = logits.gather(2, ids[None, :, None].expand(len(logits), -1, 1))
            among = (logits < own).sum(2) < LOWEST
            shares = np.asarray(among.double().mean(1).cpu()).tolist()
            yield [(Head(site.layer, h, site.tower), [shares[h]]) for h in range(site.n_heads)]
