"""VHR: reinforce the heads that the image moves most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING

import torch

from interp.edits.base import HeadEdit
from interp.edits.scale_heads import scale
from interp.edits.values import Number, fixed, number, vector
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class VHR(HeadEdit):
    """Vision-aware head reinforcement (He et al., ACL 2025, arXiv 2412.13949): z_h ← α z_h before W_O, for the heads
    whose output moves most when the image is taken away. A fixed set, in all steps after the first generated token.

    Args:
        heads: the set; or `divergence` and `text_activation`, each (layers, heads), from which `select` finds it.
        alpha: 2 in the paper; 4 degenerates.
        layers: the layer of each row of `divergence`; None for 0, 1, ….
        scope: "decode" (the paper's); "all" and "prefill" are possible.

    Raises:
        EditError: neither heads nor divergence, or both; a divergence without text_activation.
    """

    heads: tuple[Head, ...] | None = None
    alpha: Number = 2.0
    scope: Scope = "decode"
    divergence: InitVar[torch.Tensor | None] = None
    text_activation: InitVar[torch.Tensor | None] = None
    layers: InitVar[Sequence[int] | None] = None

    name = "vhr"

    def __post_init__(
        self,
        divergence: torch.Tensor | None,
        text_activation: torch.Tensor | None,
        layers: Sequence[int] | None,
    ) -> None:
        if (self.heads is None) == (divergence is None):
            raise EditError("vhr needs heads, or divergence and text_activation to find them: one of the two.")
        if divergence is not None:
            if text_activation is None:
                raise EditError("vhr needs text_activation beside divergence, for its outlier guard.")
            object.__setattr__(self, "heads", self.select(divergence, text_activation, layers))
        object.__setattr__(self, "alpha", number(self.alpha, "α of vhr"))
        self.settle()

    @staticmethod
    def select(
        vhd: torch.Tensor, text_activation: torch.Tensor, layers: Sequence[int] | None = None
    ) -> tuple[Head, ...]:
        """The heads reinforced, layer by layer, from vhd ‖a(with image) − a(image removed)‖₂ and text_activation
        ‖a(image removed)‖², a (layers, heads, d) the output before W_O at the last position.

        A divergence counts as 0 where it and the text activation are both above mean + σ over the layer's heads (σ of
        the population: the paper does not say); selected are those above the layer's median.
        """
        if vhd.ndim != 2 or vhd.shape != text_activation.shape:
            raise EditError(
                f"Divergence and text activation are (layers, heads) each, not {tuple(vhd.shape)} and "
                f"{tuple(text_activation.shape)}."
            )
        numbers = list(range(len(vhd))) if layers is None else list(layers)
        if len(numbers) != len(vhd):
            raise EditError(f"There are {len(numbers)} layer numbers for {len(vhd)} layers of divergence.")

        def high(x: torch.Tensor) -> torch.Tensor:
            return x > x.mean(-1, keepdim=True) + x.std(-1, correction=0, keepdim=True)

        vhd, text_activation = vhd.double(), text_activation.double()
        guarded = torch.where(high(vhd) & high(text_activation), 0.0, vhd)
        chosen = guarded > guarded.quantile(0.5, -1, keepdim=True)
        return tuple(Head(numbers[row], head) for row, head in chosen.nonzero().tolist())

    def is_identity(self) -> bool:
        return fixed(self.alpha, 1) or super().is_identity()

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        chosen = set(self.heads_at(call.site))
        return scale(z, vector([self.alpha if h in chosen else 1.0 for h in range(call.site.n_heads)], z.device))

    def route(self, site: Site) -> str:
        return f"vhr × {self.alpha:g} on {len(self.heads_at(site))} heads: z scaled after the kernel"
