"""One layer's weights by query head, whichever library holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from interp_hooks.errors import TapError

#: b_Q is refused with W_Q, and so on
_WITH = {"b_Q": "W_Q", "b_K": "W_K", "b_V": "W_V", "b_O": "W_O"}


@dataclass(frozen=True, repr=False)
class HeadWeights:
    """One layer's weights by query head.

    With x what the layer's attention reads: x W_Q[h] + b_Q[h] are its queries before rotation, and
    so for keys and values; the layer's output is Σ_h z_h W_O[h] + b_O. Each is checked against the
    model's own numbers, adapters and quantisation included. One that the model has no matrix for is
    refused when it is asked for, and the others stand.

    Attributes:
        W_Q, W_K, W_V: (heads, d_model, d_head).
        W_O: (heads, d_head, d_model).
        b_Q, b_K, b_V: (heads, d_head) or None.
        b_O: (d_model,) or None.
        normed: "q", "k" where the model norms queries or keys after these, which is not folded in.
        refused: name of a matrix → why there is none.

    Raises:
        TapError: a matrix of `refused` is asked for.

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
    normed: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __getattribute__(self, name: str) -> Any:
        if name[:2] in ("W_", "b_"):
            reason = self.refused.get(_WITH.get(name, name))
            if reason is not None:
                raise TapError(reason)
        return object.__getattribute__(self, name)

    def __repr__(self) -> str:
        def size(name: str) -> str:
            return "refused" if name in self.refused else str(tuple(getattr(self, name).shape))

        return f"HeadWeights({', '.join(f'{n} {size(n)}' for n in _WITH.values())})"

    def result(self, z: torch.Tensor) -> torch.Tensor:
        """(batch, queries, heads, d_model): each head's contribution z_h W_O[h] to the residual
        stream."""
        return torch.einsum("bqhd,hdm->bqhm", z, self.W_O.to(z))
