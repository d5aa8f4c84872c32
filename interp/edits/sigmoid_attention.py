"""Sigmoid attention in place of the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from interp.edits.head_edit import HeadEdit
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_kernels import Request, Result, Steer, visible

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model


@dataclass(frozen=True)
class SigmoidAttention(HeadEdit):
    """Replaces the softmax by a sigmoid: A = σ(logits + b), nothing normalised.

    (Ramapuram et al., ICLR 2025, arXiv 2409.04431.) For models trained so, or to be trained: no
    setting of it is the softmax. No other edit of the weights goes with it, and no statistics.

    Args:
        bias: b; None for −ln n.
        length: n; None for the keys that each sample's last row in this forward sees, which in
            generation grows from step to step (give a length where prefill and decode must agree).
        heads: whole layers (all their heads), None for all.
        scope: "all", "prefill" or "decode".

    Misleads:
        No setting of it is the softmax. On a model that was not trained so it shows what breaking
        the attention does, and nothing of sigmoid attention.

    Raises:
        EditError: a length below 1, some heads of a layer only; in use, sink logits, or a
            TransformerLens model.

    Example:
        >>> ids = torch.arange(8)[None]
        >>> with model.edit(interp.edits.SigmoidAttention(bias=-100.0)), model.capture_z() as z:
        ...     _ = model.logits(ids)
        >>> bool((z[0].abs() < 1e-6).all())  # σ of it is 0, and nothing is normalised
        True
    """

    bias: float | None = None
    length: int | None = None
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"

    name = "sigmoid_attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "bias", self._number("bias"))
        object.__setattr__(self, "length", self._count("length"))
        if self.bias is not None and self.length is not None:
            raise EditError("sigmoid_attention takes bias or length, not both.")
        if self.bias is not None and not math.isfinite(self.bias):
            raise EditError(f"The bias of sigmoid_attention must be finite, got {self.bias}.")
        if self.length is not None and self.length < 1:
            raise EditError(f"The length of sigmoid_attention is 1 or more, not {self.length}.")

    def check_model(self, model: Model) -> None:
        super().check_model(model)
        self.check_whole_layers(model)

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        if call.pattern is not None:
            raise EditError(
                "sigmoid_attention needs the logits, and TransformerLens shows the "
                "weights after the "
                "softmax; load the HuggingFace model."
            )
        if call.sinks is not None:
            raise EditError(
                "sigmoid_attention does not go with this model's sink logits, a share of the "
                "softmax."
            )
        if self.bias is not None:
            return Steer(sigmoid=float(self.bias))
        if self.length is not None:
            return Steer(sigmoid=-math.log(self.length))
        count = _seen_by_last(call).clamp_min(1).float()  # (batch or 1, heads or 1)
        return Steer(sigmoid=0.0, bias=-count.log()[..., None].expand(-1, -1, call.n_keys))

    def route(self, site: Site) -> str:
        return "sigmoid_attention: a pass over all keys"


def _seen_by_last(call: AttentionCall) -> torch.Tensor:
    """(batch or 1, heads or 1): how many keys the last row sees."""
    mask, n = call.mask, call.n_queries
    dense = None if mask.dense is None else mask.dense[:, :, -1:]
    last = replace(mask, q_start=mask.q_start + n - 1, queries=None, dense=dense)
    return visible(last, call.batch, 1, call.n_keys, call.value.device)[:, :, 0].sum(-1)
