"""Add a fixed vector to the output of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interp.edits.fold import Affine
from interp.edits.vector_edit import VectorEdit

if TYPE_CHECKING:
    from interp_hooks.call import Site
    from interp_hooks.protocol import Model


@dataclass(frozen=True)
class ShiftHeads(VectorEdit):
    """Adds a vector to the output of heads: z_h ← z_h + α b_h before W_O.

    The additive edit of inference-time intervention (Li et al. 2023, arXiv 2306.03341, §3.2:
    b_h = σ_h θ_h; `interp.edits.iti_for` finds heads, θ and σ from two lists of texts) and its
    relatives. Being the same for every token, it can be baked into a checkpoint (`interp.export`).

    Args:
        directions: head → vector (d_head,), heads in any spelling; lists or tensors, through which
            gradients flow.
        strength: α, of all the heads; 0 is the identity.
        scope: "all", "prefill" or "decode".
        queries: (start, stop) tokens; None for all rows.

    Misleads:
        A vector that is long enough breaks any model, and broken answers differ too: look at what
        the model then writes, and add vectors of the same length in random directions beside it.

    Raises:
        EditError: no vectors, a head twice, a vector that is not finite; in use, one that is not as
            long as a head's output.

    Example:
        >>> edit = interp.edits.ShiftHeads({"L2H3": torch.ones(32)}, strength=0.5)
        >>> with model.edit(edit), model.capture_z() as shifted:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> with model.capture_z() as own:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> bool(torch.allclose(shifted[2][:, :, 3], own[2][:, :, 3] + 0.5))
        True
    """

    name = "shift_heads"
    crosses = True

    def changed(self, z: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return z + (self.strength * vector).to(z.dtype)

    def folded(self, model: Model) -> Mapping[Site, Affine]:
        self.check_unbounded()
        self.check_model(model)
        found = {}
        for site in (s for s in model.sites if self.at(s)):
            shifts = self.vectors_at(site)
            width = next(iter(shifts.values())).shape[0]
            offset = torch.zeros(site.n_heads, width, dtype=torch.float64)
            for head, shift in shifts.items():
                offset[head] = self.strength * shift.detach().cpu().double()
            found[site] = Affine(torch.ones(site.n_heads, dtype=torch.float64), offset)
        return found

    def route(self, site: Site) -> str:
        heads = ", ".join(map(str, sorted(self.vectors_at(site))))
        return f"shift_heads {heads}: a vector added to z after the kernel"
