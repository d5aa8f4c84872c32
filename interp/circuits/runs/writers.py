"""How a layer's heads write to the residual stream: W_O, then a norm on the branch or a factor
where the architecture has one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from interp_hooks.head_weights import HeadWeights
from interp_hooks.norms import Norm


@dataclass(frozen=True)
class Writer:
    """written(z) = factor · norm(Σ_h z_h W_O,h + b_O), as a model adds it to the stream.

    `norm` is None where the sum goes to the stream as it is (most architectures); it is there in
    Gemma 2 and 3 and OLMo 2. `factor` is 1 but for scaled branches (Granite).

    A norm is no sum over heads, but with its scale 1/σ held at one run it is one: head h writes
    factor · gain ⊙ (z_h W_O,h − its mean over d_model, if the norm centres) / σ. At the run that σ
    is of, these add up to what the heads write together, less what b_O and the norm's bias give.
    """

    weights: HeadWeights
    norm: Norm | None = None
    factor: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether heads write z_h W_O,h and no more."""
        return self.norm is None and self.factor == 1.0

    def total(self, z: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, d_model): Σ_h z_h W_O,h + b_O of z (batch, tokens, heads, d_head)."""
        W, b = self.weights.W_O, self.weights.b_O
        out = z.flatten(2) @ W.to(z).flatten(0, 1)
        return out if b is None else out + b.to(z)

    def written(self, z: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, d_model): what the heads write together, bias, norm and factor
        included."""
        return self.passed(self.total(z))

    def passed(self, total: torch.Tensor) -> torch.Tensor:
        """(…, d_model): what comes of Σ_h z_h W_O,h + b_O on its way to the stream."""
        return (total if self.norm is None else self.norm.module(total)) * self.factor

    def raw(self, z: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, heads, d_model): z_h W_O,h, times the factor where no norm follows."""
        each = self.weights.result(z)
        return each if self.norm is not None or self.factor == 1.0 else each * self.factor

    def scale(self, z: torch.Tensor) -> torch.Tensor | None:
        """(batch, tokens, 1): 1/σ of the branch's norm at this run; None without a norm."""
        if self.norm is None:
            return None
        return self.norm.frozen(self.total(z).detach()).scale.to(z)

    def result(self, z: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """(batch, tokens, heads, d_model): what each head writes where the norm has this `scale`;
        linear in z."""
        each = self.weights.result(z)
        if self.norm is not None:
            assert scale is not None
            each = self.norm.centred(each) * self.norm.gain.to(each) * scale[..., None]
        return each if self.factor == 1.0 else each * self.factor


def factor_of(written: torch.Tensor, total: torch.Tensor) -> float:
    """The number by which `total` is `written`, by least squares over all entries; 1 where they are
    the same, up to rounding."""
    a, b = written.double().flatten(), total.double().flatten()
    factor = float(a @ b) / max(float(b @ b), 1e-300)
    return 1.0 if abs(factor - 1) < 1e-3 else factor
