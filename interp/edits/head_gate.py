"""HeadGate: only some heads for each token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from interp.edits.checks import counts, real
from interp.edits.head_edit import HeadEdit
from interp.errors import EditError, HeadError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head, no_attention

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model


def head_counts(keep: int | float, shared: float, heads: int) -> tuple[int, int]:
    """(always on, routed heads kept) of so many heads; shares are rounded up."""
    ours = math.ceil(shared * heads - 1e-9)
    kept = math.ceil(keep * heads - 1e-9) if isinstance(keep, float) else keep
    return ours, min(kept, heads - ours)


@dataclass(frozen=True)
class HeadGate(HeadEdit):
    """Keeps the heads with the longest queries for each token: z_h ← 0 in the others.

    Mixture of heads without parameters (`RoutedHeads` has a learned router), as in MoH-LLaMA3-8B
    (Jin et al. 2024, arXiv 2410.11842: 50 % shared, 25 % routed): the first `shared` of each
    layer's heads are always on, of the others each token keeps the `keep` ones whose query is
    longest (‖q‖₂, at the attention call), and z = 0 in the rest.

    Args:
        keep: how many routed heads a token keeps: a number of heads (int), or a share of all of a
            layer's (float).
        shared: share of the heads that are always on, the first ones.
        layers: None for all.
        scope: "all", "prefill" or "decode".

    Misleads:
        Its models went on training with it. In one that did not it takes away what was needed:
        pocket-llama's loss rises by .045 nats.

    Raises:
        EditError: numbers out of range; in use, a TransformerLens model, which shows no queries.

    Example:
        >>> edit = interp.edits.HeadGate(keep=1, shared=0.5)  # 4 + 1 of 8 heads
        >>> with model.edit(edit), model.capture_z() as z:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> (z[1] != 0).any(-1).sum(-1)
        tensor([[5, 5, 5, 5, 5, 5, 5, 5]])
    """

    keep: int | float = 0.25
    shared: float = 0.5
    layers: tuple[int, ...] | None = None
    scope: Scope = "all"
    heads: tuple[Head, ...] | None = field(default=None, init=False, repr=False)

    name = "head_gate"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", real(self.keep, "keep of head_gate"))
        object.__setattr__(self, "shared", real(self.shared, "shared of head_gate"))
        if self.keep < 0 or (isinstance(self.keep, float) and self.keep > 1):
            raise EditError(
                "head_gate keeps a number of heads (an int), or a share (0.0 to 1.0), not "
                f"{self.keep}."
            )
        if not 0 <= self.shared <= 1:
            raise EditError(
                f"The shared part of head_gate's heads is between 0 and 1, not {self.shared}."
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", counts(self.layers, "layers of head_gate"))

    def is_identity(self) -> bool:
        return (
            self.shared == 1
            or (isinstance(self.keep, float) and self.keep + self.shared >= 1)
            or self.layers == ()
        )

    def check_model(self, model: Model) -> None:
        layers = {s.layer for s in model.sites if s.kind == "self"}
        for layer in self.layers or ():
            if layer not in layers:
                raise HeadError(f"{model.name}: {no_attention(layer, layers)}.")

    def at(self, site: Site) -> bool:
        return super().at(site) and (self.layers is None or site.layer in self.layers)

    def counts(self, heads: int) -> tuple[int, int]:
        """(always on, routed heads kept) of so many heads; shares are rounded up."""
        return head_counts(self.keep, self.shared, heads)

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        if call.query is None:
            raise EditError(
                "head_gate goes by the queries, and TransformerLens shows the weights; "
                "load the "
                "HuggingFace model."
            )
        shared, kept = self.counts(call.site.n_heads)
        norms = (
            call.query[:, shared:].float().norm(dim=-1).transpose(1, 2)
        )  # (batch, queries, routed heads)
        on = torch.ones(z.shape[:3], dtype=torch.bool, device=z.device)
        on[..., shared:] = torch.zeros_like(norms, dtype=torch.bool).scatter(
            -1, norms.topk(kept, -1).indices, True
        )
        return torch.where(on[..., None], z, 0)

    def route(self, site: Site) -> str:
        shared, kept = self.counts(site.n_heads)
        return (
            f"head_gate: {shared} heads always on and {kept} of the others for each token; the "
            "rest of z is 0"
        )
