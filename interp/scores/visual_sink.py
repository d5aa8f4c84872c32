"""Attention on visual sinks."""

from __future__ import annotations

import torch

from interp.scores.image_mass import SinkScore


class VisualSink(SinkScore):
    """Σ_q Σ_{k∈sinks} A[q, k] / Σ_q Σ_{k∈image} A[q, k], over the words q after the image.

    Sinks are the image's tokens with φ(x) = max_{d∈D} |x[d]| / RMS(x) ≥ τ, x the residual stream
    that enters the layer and D the dimensions published for the model, or else those of its first
    token's massive activations there (|x[d]| ≥ τ·RMS(x)); τ is 20, and 0.31·√d_model in streams
    narrower than 484. A dimension in which the median token reaches τ is a bias of the stream and
    tells no sinks. A layer without such dimensions has no value, and a model without a note that
    says so; an image none of whose tokens is a sink has 0; a note says how many tokens are sinks.
    Shape (batch, heads).

    Misleads:
        Sinks depend on the dimensions they are looked for in: published ones, or those of the first
        token. In smol-llava they are in layers 2 to 9 only, always the first patch and often patch
        19, mostly background.
    """

    name = "visual_sink"
    title = "Visual sink"
    reading = (
        "Which share of a head's attention on the image goes to the few image tokens that "
        "are sinks."
    )
    formula = "Σ_q Σ_{k∈visual sinks} A[q, k] / Σ_q Σ_{k∈image} A[q, k], sinks: φ(x) ≥ τ"

    def of(self, sinks: torch.Tensor, others: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        of_sinks, of_others = (torch.where(rows, m, 0.0).sum(-1) for m in (sinks, others))
        share = of_sinks / (of_sinks + of_others)  # NaN where the image gets nothing at all
        return share
