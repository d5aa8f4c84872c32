"""Copying by the OV circuit, from weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from interp.scores.score import ModelScore
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.inputs.pace import Pace
    from interp.probes.settings import Settings
    from interp_hooks.model import HookedModel


class OVCopying(ModelScore):
    """Σλ / Σ|λ| over the eigenvalues λ of W_E W_V W_O W_U, norm gains folded in; see
    `interp.mechanics.copying`.

    Misleads:
        It is read from weights: what the head would write of a token, not whether it looks at one.
        Tokens are taken from the embedding; what earlier layers put into the stream is left out.
    """

    name = "ov_copying"
    title = "OV copying"
    reading = (
        "Near 1 a head raises the logits of tokens it attends to, near −1 it lowers them; "
        "from weights alone."
    )
    formula = "Σλ / Σ|λ|, λ the eigenvalues of W_E W_V W_O W_U"
    citation = "Elhage et al. 2021, A Mathematical Framework for Transformer Circuits"
    low = -1.0
    high = 1.0
    probe = "own"
    passes = "none, from weights"

    #: which of the two circuits of `copying_of`
    circuit = 0
    matrices = ("W_V", "W_O")

    def cost(self, model: HookedModel, settings: Settings) -> int:
        for layer in {h.layer for h in model.heads if h.tower == model.main_tower}:
            weights = model.head_weights(layer, model.main_tower)
            for matrix in self.matrices:  # what is not known is told before the scan
                getattr(weights, matrix)
        model.vocabulary()
        return 0

    def seconds(self, model: HookedModel, settings: Settings, pace: Pace) -> float:
        from interp.mechanics.ov_qk import seconds_of_copying

        return seconds_of_copying(model)

    def steps(self, model: HookedModel, settings: Settings) -> int:
        return model.n_layers

    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        from interp.mechanics.ov_qk import copying_of

        for layer, shares in copying_of(model).items():
            values = shares[self.circuit].tolist()
            yield [(Head(layer, h, model.main_tower), [value]) for h, value in enumerate(values)]
