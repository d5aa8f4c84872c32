"""Selective self-attention: queries and values scaled by what a token is and where it stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from interp.errors import InputError
from interp_hooks.whole_numbers import quoted


class SelectiveTemperature(nn.Module):
    """A projection whose outputs each token scales, by its features and its position.

        y_h ← (τ_tok,h + τ_pos) y_h        y = W x + b, the slice of head h
        τ_tok,h = tanh(w_h · gelu(y_h))     τ_pos = 1 + e^(−e^β) ln n for the n-th token

    (Selective self-attention, Zhang et al. 2024, arXiv 2411.12892.) On a query's projection it is
    an inverse temperature of that token's attention, on a value's it turns a token's share of the
    output up or down. The layer's own weight is the first layer of the perceptron in tanh (the
    paper's sharing of weights), so that w and β are all that is new: out_features + 1 numbers.

    w begins at 0, so that it begins as the layer itself, but for the position's factor, which at
    β = 2 is 1.004 for the 1,000th token. The released code has the position temperature alone. How
    the paper lays out the shared perceptron was not at hand: the gelu and a w for each head are
    this project's, as is leaving f's bias out.

    Args:
        linear: the projection to replace; its weight and bias become this layer's parameters.
        d_head: width of a head.
        token, position: with τ_tok, with τ_pos (otherwise 1).
        beta: β at the start: 2.0 for fine-tuning in the paper, 1.5 for GPT-2.

    Misleads:
        A constant factor is something that W alone can learn: a gain over the plain layer is the
        temperature's only where it is also one over a longer training. In a toy of copied rows
        attention is less spread with it, and longer rows are no better copied.

    Raises:
        InputError: no linear layer, or one that is no whole number of heads wide.

    Example:
        >>> layer = torch.nn.Linear(8, 8)
        >>> wrapped = interp.nn.SelectiveTemperature(layer, d_head=4, position=False)
        >>> x = torch.randn(2, 5, 8)
        >>> bool(torch.equal(wrapped(x), layer(x)))
        True
        >>> tuple(wrapped.w.shape)
        (2, 4)
    """

    def __init__(
        self,
        linear: nn.Linear,
        d_head: int,
        token: bool = True,
        position: bool = True,
        beta: float = 2.0,
    ) -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise InputError(f"SelectiveTemperature takes a torch.nn.Linear, not {quoted(linear)}.")
        if d_head < 1 or linear.out_features % d_head:
            raise InputError(
                f"A projection of width {linear.out_features} is no whole number of heads of width "
                f"{d_head}."
            )
        if not math.isfinite(beta):
            raise InputError(f"β of SelectiveTemperature must be finite, got {beta}.")
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        heads, like = self.out_features // d_head, self.weight
        self.w = nn.Parameter(like.new_zeros(heads, d_head)) if token else None
        self.beta = nn.Parameter(like.new_tensor(float(beta))) if position else None
        #: (batch or 1, tokens), from 0; None where the tokens of a row are all there is
        self.positions: torch.Tensor | None = None

    def temperature(self, y: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, heads or 1): the factors of outputs y (batch, tokens, heads, d_head)."""
        tau = torch.ones_like(y[..., :1, 0])
        if self.beta is not None:
            tokens = y.shape[-3]
            here = self.positions
            if here is None:
                here = torch.arange(tokens, device=y.device)
            if here.shape[-1] != tokens:
                raise InputError(
                    f"SelectiveTemperature was told {here.shape[-1]} positions and reads {tokens} "
                    "tokens."
                )
            n = (here.to(y.device) + 1).clamp_min(1).to(y.dtype)[..., None]  # (…, tokens, 1)
            tau = tau + torch.exp(-torch.exp(self.beta)) * n.log()
        if self.w is not None:
            tau = tau + torch.tanh((nn.functional.gelu(y) * self.w).sum(-1))
        return tau

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)  # (batch, tokens, heads · d_head)
        by_head = y.unflatten(-1, (-1, self._d_head))
        return (by_head * self.temperature(by_head)[..., None]).flatten(-2)

    @property
    def _d_head(self) -> int:
        return self.out_features if self.w is None else self.w.shape[1]

    def extra_repr(self) -> str:
        parts = [n for n, p in (("token", self.w), ("position", self.beta)) if p is not None]
        return f"{self.in_features}, {self.out_features}, {' and '.join(parts) or 'none'}"


def selective(
    model: nn.Module,
    projections: Sequence[str] = ("q_proj", "v_proj"),
    token: bool = True,
    position: bool = True,
    beta: float = 2.0,
) -> list[str]:
    """Gives a model's query and value projections a `SelectiveTemperature`, in place.

    Each attention tells its projections where its tokens stand (`position_ids`), so that padding
    and caches count right.

    Args:
        model: any model whose attention modules hold these projections and say `head_dim`.
        projections: their names in an attention module.
        token, position, beta: as in `SelectiveTemperature`.

    Returns:
        the names of the replaced layers.

    Raises:
        InputError: a model without such projections, or one that does not say its heads' width.

    Example:
        >>> net = interp.load("llama").module
        >>> interp.nn.selective(net)[:2]
        ['model.layers.0.self_attn.q_proj', 'model.layers.0.self_attn.v_proj']
    """
    found = []
    for name, attention in list(model.named_modules()):
        mine = [p for p in projections if isinstance(getattr(attention, p, None), nn.Linear)]
        if not mine:
            continue
        width = getattr(attention, "head_dim", None)
        if not isinstance(width, int):
            raise InputError(
                f"{name or 'The model'} does not say head_dim, the width of its heads."
            )
        for projection in mine:
            layer = SelectiveTemperature(
                getattr(attention, projection), width, token, position, beta
            ).train(attention.training)
            setattr(attention, projection, layer)
            found.append(f"{name}.{projection}" if name else projection)
        attention.register_forward_pre_hook(_tell, with_kwargs=True)
    if not found:
        raise InputError(f"No attention of this model has {' or '.join(projections)}.")
    return found


def _tell(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Before an attention's forward: where its tokens stand."""
    where = kwargs.get("position_ids")
    for part in attention.children():
        if isinstance(part, SelectiveTemperature):
            part.positions = where
            if (
                where is None
                and part.beta is not None
                and kwargs.get("past_key_values") is not None
            ):
                raise InputError(
                    "SelectiveTemperature does not know where these tokens stand: this attention "
                    "is given a cache and no position_ids."
                )
