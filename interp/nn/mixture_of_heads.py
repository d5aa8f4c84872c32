"""Mixture of heads: routers of all layers, to be trained with the model or after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from interp.edits.head_gate import head_counts
from interp.edits.routed_heads import RoutedHeads, Routing
from interp.errors import InputError
from interp_hooks.edit import BoundEdit, LiveEdit

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall
    from interp_hooks.model import HookedModel
    from interp_hooks.protocol import Model


class MixtureOfHeads(nn.Module):
    """Routers that learn which heads each token has, for all layers of a model (MoH).

    (Jin et al. 2024, arXiv 2410.11842, §3.2; the gates are `interp.edits.RoutedHeads`'.) The
    module's one parameter is `weights` (layers, heads + 2, d_model). In a block the model runs
    under it, with gradients into routers and model:

        ``with moh.on(model): loss = lm_loss(model(ids)) + 0.01 * moh.balance(); loss.backward()``

    `balance` is the load-balance loss of the last forward, R Σ_i P_i f_i over R routed heads, mean
    over layers: P_i the mean of softmax(W_r x)_i over tokens, f_i the share of tokens that keep
    head i. It is k where all heads are kept alike.

    W_s and W_b begin at 0 and W_r near it, so kept heads begin with gates near 1 and the rest of
    the routed heads is left out at random; with all heads kept the model is its own.

    Args:
        model: the model that it is for: its layers, heads and width.
        keep, shared, straight: as in `RoutedHeads`.
        seed: of W_r.

    Misleads:
        A loss that falls with it need not come from the router: train the model as long without
        it, and with fixed heads.

    Raises:
        EditError: numbers out of range; a model whose layers have different numbers of heads.

    Example:
        >>> moh = interp.nn.MixtureOfHeads(model, keep=0.25)
        >>> with moh.on(model):
        ...     loss = model.logits(torch.arange(8)[None]).square().mean() + moh.balance()
        >>> loss.backward()
        >>> bool(moh.weights.grad.abs().sum() > 0)
        True
        >>> moh.edit().name
        'routed_heads'
    """

    #: standard deviation of W_r at the start
    START = 0.02

    def __init__(
        self,
        model: HookedModel,
        keep: int | float = 0.25,
        shared: float = 0.5,
        straight: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        width = model.module.get_input_embeddings().weight.shape[1]
        weights = torch.zeros(model.n_layers, model.n_heads + 2, width)
        first, _ = head_counts(keep, shared, model.n_heads)
        draw = torch.randn(
            model.n_layers,
            model.n_heads - first,
            width,
            generator=torch.Generator().manual_seed(seed),
        )
        weights[:, first:-2] = self.START * draw
        self.weights = nn.Parameter(weights.to(model.device))
        self.keep, self.shared, self.straight = keep, shared, straight
        self._balance: dict[int, torch.Tensor] = {}
        self.edit().check_model(model)

    def edit(self) -> RoutedHeads:
        """The routers as an edit, a copy without gradients: to evaluate, and to save with
        `interp.edits.save`."""
        return self._edit(self.weights.detach().clone())

    def _edit(self, weights: torch.Tensor) -> RoutedHeads:
        return RoutedHeads(weights, self.keep, self.shared, self.straight)

    def balance(self) -> torch.Tensor:
        """(): the load-balance loss of the last forward in a block of `on`. Raises `InputError`
        where there was none."""
        if not self._balance:
            raise InputError("balance is of a forward in a block of MixtureOfHeads.on.")
        return torch.stack(list(self._balance.values())).mean()

    @contextmanager
    def on(self, model: HookedModel) -> Iterator[None]:
        """A block in which the model runs under the routers, with gradients."""
        self._balance.clear()
        with model.edit(_Learning(self)):
            yield

    def note(self, call: AttentionCall, said: Routing) -> None:
        """Keep a layer's part of the load-balance loss."""
        real = call.mask.queries
        rows = torch.ones(said.on.shape[:2], device=said.on.device) if real is None else real
        rows = rows.expand(said.on.shape[:2]).to(said.share)[..., None]  # (batch, queries, 1)
        n = rows.sum().clamp_min(1)
        share = (said.share * rows).sum((0, 1)) / n  # (routed,)
        kept = (said.on * rows).sum((0, 1)) / n
        self._balance[call.site.layer] = share.shape[0] * (share * kept).sum()


class _Learning(LiveEdit):
    """The routers in one block, which note what they say."""

    def __init__(self, routers: MixtureOfHeads):
        self.routers = routers

    def bind(self, model: Model) -> BoundEdit[RoutedHeads]:
        edit = self.routers._edit(self.routers.weights)
        edit.check_model(model)
        return _Noted(edit, self.routers)


class _Noted(BoundEdit[RoutedHeads]):
    def __init__(self, edit: RoutedHeads, routers: MixtureOfHeads):
        super().__init__(edit)
        self.routers = routers

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        said = self.edit.routing(call)
        self.routers.note(call, said)
        return z * said.gates.to(z.dtype)[..., None]
