"""One layer's weights by query head, whichever library holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HeadWeights:
    """One layer's weights by query head.

    The layer's output is Σ_h z_h W_O[h] + b_O. Query/key norms are not folded in.

    Attributes:
        W_Q, W_K, W_V: (heads, d_model, d_head).
        W_O: (heads, d_head, d_model).
        b_Q, b_K, b_V: (heads, d_head) or None.
        b_O: (d_model,) or None.

    Example:
        >>> weights = model.head_weights(2)
        >>> with model.capture_z() as z, model.capture_resid() as resid:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> out = torch.einsum("bqhd,hdm->bqm", z[2], weights.W_O)
        >>> bool(torch.allclose(out, resid["mid", 2] - resid["pre", 2], atol=1e-4))
        True
    """

    W_Q: torch.Tensor
    W_K: torch.Tensor
    W_V: torch.Tensor
    W_O: torch.Tensor
    b_Q: torch.Tensor | None = None
    b_K: torch.Tensor | None = None
    b_V: torch.Tensor | None = None
    b_O: torch.Tensor | None = None

    def result(self, z: torch.Tensor) -> torch.Tensor:
        """(batch, queries, heads, d_model): each head's contribution z_h W_O[h] to the residual
        stream."""
        return torch.einsum("bqhd,hdm->bqhm", z, self.W_O.to(z))
