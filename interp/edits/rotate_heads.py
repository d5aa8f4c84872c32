"""Take a direction out of the output of heads, and keep its length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interp.edits.vector_edit import VectorEdit, tensor
from interp.errors import EditError

if TYPE_CHECKING:
    from interp_hooks.call import Site


@dataclass(frozen=True)
class RotateHeads(VectorEdit):
    """Turns the output of heads away from a direction, its length kept: what CREST does.

    With v̂ = v / ‖v‖ and the share α of v̂ taken out,

        ẑ = z − α (z·v̂) v̂        z ← ẑ ‖z‖ / ‖ẑ‖

    (Zhang et al. 2025, arXiv 2512.24574, with α = 1; `interp.edits.crest_for` finds heads and
    directions from two lists of texts). Where ẑ is 0, z stays.

    Args:
        directions: head → vector (d_head,), of any length but 0.
        strength: α; 1 takes the direction out, 2 reflects z, below 0 it turns towards v.
        scope: "all", "prefill" or "decode"; the paper steers while the model writes.
        queries: (start, stop) tokens; None for all rows.

    Misleads:
        Any direction that is taken out changes something: beside it belong as many random heads
        turned away from their own directions.

    Raises:
        EditError: no vectors, a head twice, a vector that is 0 or not finite; in use, one that is
            not as long as a head's output.

    Example:
        >>> v = torch.eye(32)[0]
        >>> with model.edit(interp.edits.RotateHeads({"L2H3": v})), model.capture_z() as turned:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> with model.capture_z() as own:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> z, was = turned[2][:, :, 3], own[2][:, :, 3]
        >>> bool(z[..., 0].abs().max() < 1e-5)
        True
        >>> bool(torch.allclose(z.norm(dim=-1), was.norm(dim=-1)))
        True
    """

    name = "rotate_heads"

    def __post_init__(self, directions) -> None:  # type: ignore[no-untyped-def, override]
        super().__post_init__(directions)
        for head, vector in zip(self.heads, self.vectors, strict=True):
            if not bool((tensor(vector).detach() != 0).any()):
                raise EditError(f"The vector of {head} is 0 and shows in no direction.")

    def changed(self, z: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        wide = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        unit = (vector / vector.norm()).to(wide.dtype)
        left = wide - self.strength * (wide @ unit)[..., None] * unit
        length, own = left.norm(dim=-1, keepdim=True), wide.norm(dim=-1, keepdim=True)
        turned = left * (own / torch.where(length > 0, length, 1))
        return torch.where(length > 0, turned, wide).to(z.dtype)

    def route(self, site: Site) -> str:
        heads = ", ".join(map(str, sorted(self.vectors_at(site))))
        return f"rotate_heads {heads}: z turned after the kernel"
