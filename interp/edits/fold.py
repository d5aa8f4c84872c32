"""What an edit does to z where it is the same for every token: a gain and an offset for each head.

Such an edit is a change of W_O and of the output's bias, Σ_h W_O,h (γ_h z_h + b_h), so that weights
can hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from interp_hooks.call import Site


@dataclass(frozen=True)
class Affine:
    """z_h ← γ_h z_h + b_h at a site.

    Attributes:
        gain: (heads,) float64 γ.
        offset: (heads, d_head) float64 b; None where it is 0.
    """

    gain: torch.Tensor
    offset: torch.Tensor | None = None

    def then(self, after: Affine) -> Affine:
        """This, and then `after`: γ₂(γ₁z + b₁) + b₂."""
        offset = after.offset
        if self.offset is not None:
            moved = after.gain[:, None] * self.offset
            offset = moved if offset is None else moved + offset
        return Affine(after.gain * self.gain, offset)


def composed(folds: Iterable[Mapping[Site, Affine]]) -> dict[Site, Affine]:
    """Edits one after the other, site by site."""
    found: dict[Site, Affine] = {}
    for fold in folds:
        for site, affine in fold.items():
            found[site] = found[site].then(affine) if site in found else affine
    return found
