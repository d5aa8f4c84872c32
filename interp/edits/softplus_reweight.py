"""Softplus attention with re-weighting (LSSA, LSSAR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interp.edits.head_edit import HeadEdit
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_kernels import softplus_attention

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class SoftplusReweight(HeadEdit):
    """Replaces the softmax by a length-scaled softplus with re-weighting (LSSAR).

    (Gao & Spratling 2025, arXiv 2501.13428.)

        A = softplus(ln d · ln N_i · q̂·k̂), rows normalised
        A' = ReLU(N_i A − 1)^p, rows normalised, 0 for N_i < 4

    with q̂, k̂ of length 1 and N_i the keys that row i sees. For models trained so, or to be
    trained: no setting of it is the softmax. It stands in for what weights and other edits of them
    would give; the model's scale and soft-cap have no part in it.

    Args:
        power: p, 3 or 15 in the paper; None for no re-weighting (LSSA).
        heads: None for all.
        scope: "all", "prefill" or "decode".

    Misleads:
        No setting of it is the softmax. On a model that was not trained so it shows what breaking
        the attention does, and nothing of LSSAR.

    Raises:
        EditError: p < 1; in use, sink logits, or a TransformerLens model, which shows no queries.

    Example:
        >>> with model.edit(interp.edits.SoftplusReweight(power=3)), model.capture_z() as z:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> (z[0][0] != 0).any(-1).any(-1).tolist()  # 0 for N_i < 4
        [False, False, False, True, True, True, True, True]
    """

    power: float | None = 15
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"

    name = "softplus_reweight"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "power", self._number("power"))
        if self.power is not None and not 1 <= self.power < float("inf"):
            raise EditError(f"The power of softplus_reweight is 1 or more, not {self.power}.")

    def attend(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        if call.query is None or call.key is None:
            raise EditError(
                "softplus_reweight needs queries and keys, and TransformerLens shows "
                "the weights; load the "
                "HuggingFace model."
            )
        if call.sinks is not None:
            raise EditError(
                "softplus_reweight does not go with this model's sink logits, a share of the "
                "softmax."
            )
        heads = self.heads_at(call.site)
        out = softplus_attention(
            call.query, call.key, call.value, mask=call.mask, power=self.power, heads=heads
        ).transpose(1, 2)  # (batch, queries, chosen heads, d)
        if len(heads) == call.site.n_heads:
            return out
        z = z.clone()
        z[:, :, heads] = out
        return z

    def route(self, site: Site) -> str:
        return (
            "softplus_reweight: softplus attention, two passes over the keys, after the model's own"
        )
