"""VHR: reinforce the heads that the image moves most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING

import torch

from interp.edits.head_edit import HeadEdit
from interp.edits.keys import per_sample
from interp.edits.scale_heads import scale
from interp.edits.values import Number, fixed, number, vector
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model


@dataclass(frozen=True)
class VHR(HeadEdit):
    """Vision-aware head reinforcement (VHR): z_h ← α z_h before W_O in heads that need the image.

    (He et al., ACL 2025, arXiv 2412.13949.) They are the heads whose output moves most when the
    image is taken away. A fixed set, in all steps of generation, from the prompt's last position
    on, which makes the first token (a one-word answer is made there). `vhr_for(model, inputs)`
    finds the set of a prompt.

    Args:
        heads: the set; or `selected`, or `divergence` and `text_activation`.
        alpha: 2 in the paper; 4 degenerates.
        scope: "decode" (the paper's); "all" and "prefill" are possible.
        selected: (batch, layers, heads) bool, a set for each sample of a batch (under beams each
            sample's own, repeated).
        first: with "decode", the prompt's last position too; left padding only.
        divergence, text_activation: each (layers, heads), from which `select` finds the set.
        layers: the layer of each row of `divergence`; None for 0, 1, ….

    Misleads:
        α has a cliff: at 4 the text degenerates. As many random heads did as well on the models
        tried here, so run that control.

    Raises:
        EditError: none or several of heads, selected and divergence; a divergence without
            text_activation; in use, `selected` of another model's geometry or batch, right padding
            with `first`.

    Example:
        >>> divergence = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> interp.edits.VHR(divergence=divergence, text_activation=torch.ones(1, 4)).heads
        (L0H2, L0H3)
    """

    heads: tuple[Head, ...] | None = None
    alpha: Number = 2.0
    scope: Scope = "decode"
    selected: torch.Tensor | None = None
    first: bool = True
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
        if sum(x is not None for x in (self.heads, self.selected, divergence)) != 1:
            raise EditError(
                "vhr needs heads, or selected, or divergence and text_activation to find them: one "
                "of the three."
            )
        if divergence is not None:
            if text_activation is None:
                raise EditError(
                    "vhr needs text_activation beside divergence, for its outlier guard."
                )
            object.__setattr__(self, "heads", self.select(divergence, text_activation, layers))
        if self.selected is not None:
            if not isinstance(self.selected, torch.Tensor):
                raise EditError(
                    "selected of vhr is a tensor (batch, layers, heads) of heads, not "
                    f"{quoted(self.selected)}."
                )
            if self.selected.ndim != 3:
                raise EditError(
                    f"selected of vhr is (batch, layers, heads), not {tuple(self.selected.shape)}."
                )
            object.__setattr__(self, "selected", self.selected.bool())
        object.__setattr__(self, "alpha", number(self.alpha, "α of vhr"))
        super().__post_init__()

    @staticmethod
    def select(
        vhd: torch.Tensor,
        text_activation: torch.Tensor,
        layers: Sequence[int] | None = None,
        guard: bool = True,
    ) -> tuple[Head, ...]:
        """The heads reinforced, layer by layer, from vhd ‖a(with image) − a(image removed)‖₂ and
        text_activation ‖a(image removed)‖², a (layers, heads, d) the output before W_O at the last
        position; see `above_median`."""
        if vhd.ndim != 2 or vhd.shape != text_activation.shape:
            raise EditError(
                f"Divergence and text activation are (layers, heads) each, not {tuple(vhd.shape)} "
                "and "
                f"{tuple(text_activation.shape)}."
            )
        numbers = list(range(len(vhd))) if layers is None else list(layers)
        if len(numbers) != len(vhd):
            raise EditError(
                f"There are {len(numbers)} layer numbers for {len(vhd)} layers of divergence."
            )
        mask = above_median(vhd, text_activation, guard)
        return tuple(Head(numbers[row], head) for row, head in mask.nonzero().tolist())

    @property
    def concerned(self) -> tuple[Head, ...] | None:
        if self.selected is None:
            return self.heads
        return tuple(Head(layer, head) for layer, head in self.selected.any(0).nonzero().tolist())

    def check_model(self, model: Model) -> None:
        super().check_model(model)
        if self.selected is not None and self.selected.shape[1:] != (model.n_layers, model.n_heads):
            raise EditError(
                f"selected of vhr is for {self.selected.shape[1]} layers of "
                f"{self.selected.shape[2]} heads, and "
                f"{model.name} has {model.n_layers} of {model.n_heads}."
            )

    def is_identity(self) -> bool:
        return fixed(self.alpha, 1) or super().is_identity()

    def touches(self, call: AttentionCall) -> bool:
        return super().touches(call) or (self._starts(call) and self.at(call.site))

    def _starts(self, call: AttentionCall) -> bool:
        """Whether of this call the last row alone is reinforced."""
        return self.first and self.scope == "decode" and not call.is_decode

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        if not self._starts(call):
            return self._reinforced(call, z)
        if call.mask.queries is not None and not bool(call.mask.queries[:, -1].all()):
            raise EditError(
                "vhr starts at the last row of a prompt, which is padding here; pad on the left."
            )
        return torch.cat([z[:, :-1], self._reinforced(call, z[:, -1:])], 1)

    def _reinforced(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        if self.selected is not None:
            mine = per_sample(
                call, self.selected[:, call.site.layer, : call.site.n_heads], "selected heads"
            )
            gains = torch.where(mine, vector([self.alpha], z.device), 1.0)  # (batch or 1, heads)
            return z * gains.to(z.dtype)[:, None, :, None]
        heads = set(self.heads_at(call.site))
        return scale(
            z,
            vector([self.alpha if h in heads else 1.0 for h in range(call.site.n_heads)], z.device),
        )

    def route(self, site: Site) -> str:
        return (
            f"vhr × {self.alpha:g} on {len(self.heads_at(site))} heads: z scaled after the kernel"
        )


def above_median(
    vhd: torch.Tensor, text_activation: torch.Tensor, guard: bool = True
) -> torch.Tensor:
    """(…, heads) bool of divergences and text activations (…, heads), a row a layer: the heads
    above the layer's median. With `guard` a divergence counts as 0 where it and the text activation
    are both above mean + σ over the layer's heads (σ of the population: the paper does not say)."""

    def high(x: torch.Tensor) -> torch.Tensor:
        return x > x.mean(-1, keepdim=True) + x.std(-1, correction=0, keepdim=True)

    vhd, text_activation = vhd.double(), text_activation.double()
    if guard:
        vhd = torch.where(high(vhd) & high(text_activation), 0.0, vhd)
    return vhd > vhd.quantile(0.5, -1, keepdim=True)
