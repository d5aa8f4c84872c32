"""σReparam: linear layers whose spectral norm is a learned number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from interp.errors import InputError
from interp_hooks.whole_numbers import quoted


class SigmaReparam(nn.Module):
    """A linear layer with the weight γ/σ(W)·W: its spectral norm is γ, which is learned.

        y = (γ / σ(W)) x Wᵀ + b        σ(W) = uᵀ W v

    (Zhai et al. 2023, arXiv 2303.06296.) u and v follow W's largest singular vectors by one step of
    power iteration in each forward in training mode; they take no gradient. A query's and a key's
    projection that can't grow keep the logits, and with them the entropy of attention, from running
    away at large learning rates.

    It begins with γ = 1, as in the paper, or with γ = σ(W) (`keep`), as the layer that it replaces.

    Args:
        linear: the layer to replace; its weight and bias become this layer's parameters.
        keep: begin with the layer's own outputs.

    Raises:
        InputError: no linear layer.

    Example:
        >>> layer = torch.nn.Linear(8, 4)
        >>> wrapped = interp.nn.SigmaReparam(layer, keep=True)
        >>> x = torch.randn(2, 8)
        >>> bool(torch.allclose(wrapped(x), layer(x), atol=1e-5))
        True
        >>> tuple(wrapped.gamma.shape)
        ()
    """

    #: steps of power iteration at the start
    STEPS = 50

    u: torch.Tensor
    v: torch.Tensor

    def __init__(self, linear: nn.Linear, keep: bool = False) -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise InputError(f"SigmaReparam takes a torch.nn.Linear, not {quoted(linear)}.")
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        wide = self.weight.detach().double()
        v = torch.ones(self.in_features, dtype=torch.float64, device=wide.device)
        # a start that is orthogonal to no direction in particular
        v = v + 0.1 * torch.arange(self.in_features, device=wide.device).cos()
        u = wide @ v
        for _ in range(self.STEPS):
            u = _unit(wide @ v)
            v = _unit(wide.T @ u)
        self.register_buffer("u", u.to(self.weight.dtype))
        self.register_buffer("v", v.to(self.weight.dtype))
        start = self.sigma().detach() if keep else torch.ones_like(self.sigma().detach())
        self.gamma = nn.Parameter(start)

    def sigma(self) -> torch.Tensor:
        """(): the estimate of W's spectral norm; gradients flow to W."""
        return self.u @ (self.weight @ self.v)

    def effective(self) -> torch.Tensor:
        """(out, in): the weight that acts."""
        return self.weight * (self.gamma / self.sigma())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.u.copy_(_unit(self.weight @ self.v))
                self.v.copy_(_unit(self.weight.T @ self.u))
        return nn.functional.linear(x, self.effective(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def reparametrise(
    model: nn.Module, which: Callable[[str], bool] | None = None, keep: bool = False
) -> list[str]:
    """Replaces a model's linear layers by `SigmaReparam`, in place.

    Args:
        model: any module.
        which: says of a layer's name whether it is replaced; None for all.
        keep: begin with the layers' own outputs.

    Returns:
        the names of the replaced layers.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> interp.nn.reparametrise(net, lambda name: name != "2")
        ['0']
    """
    found = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and (which is None or which(name))
    ]
    for name in found:
        parent, _, last = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), last, SigmaReparam(layer, keep))
    return found


@torch.no_grad()
def fold(model: nn.Module) -> list[str]:
    """Puts plain linear layers with the same outputs back, in place; returns their names.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2))
        >>> _ = interp.nn.reparametrise(net)
        >>> interp.nn.fold(net), type(net[0]).__name__
        (['0'], 'Linear')
    """
    found = [name for name, part in model.named_modules() if isinstance(part, SigmaReparam)]
    for name in found:
        part = model.get_submodule(name)
        assert isinstance(part, SigmaReparam)
        plain = nn.Linear(part.in_features, part.out_features, part.bias is not None)
        plain.to(device=part.weight.device, dtype=part.weight.dtype).train(part.training)
        plain.weight.copy_(part.effective())
        if part.bias is not None:
            plain.bias.copy_(part.bias)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    return found


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
