"""RoutedHeads: a learned router says which heads a token has, and how much of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from interp.edits.checks import real
from interp.edits.head_edit import HeadEdit
from interp.edits.head_gate import head_counts
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model


class Routing(NamedTuple):
    """What a router says of tokens.

    gates: (…, heads), the factor of each head's output; share: (…, routed heads), the softmax that
    the best are taken from; on: (…, routed heads) bool, which of them a token keeps.
    """

    gates: torch.Tensor
    share: torch.Tensor
    on: torch.Tensor


def routing(
    weights: torch.Tensor, x: torch.Tensor, shared: int, kept: int, straight: bool
) -> Routing:
    """The gates of tokens x (…, d_model) by a layer's router (heads + 2, d_model), see
    `RoutedHeads`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    logits = x @ weights.to(x).T  # (…, heads + 2)
    ours, routed, sides = logits.tensor_split((shared, weights.shape[0] - 2), -1)
    share = routed.softmax(-1)  # (…, routed)
    best = share.topk(kept, -1).indices
    on = torch.zeros_like(share, dtype=torch.bool).scatter(-1, best, True)
    chosen = share * on
    chosen = kept * chosen / chosen.sum(-1, keepdim=True).clamp_min(1e-20)
    if straight:
        # on or off forwards; backwards the gradient of the soft gates
        chosen = on.to(chosen) + (chosen - chosen.detach())
        return Routing(torch.cat([torch.ones_like(ours), chosen], -1), share, on)
    balance = 2 * sides.softmax(-1)  # (…, 2)
    if not shared:
        return Routing(chosen, share, on)
    ours = shared * ours.softmax(-1)  # (…, shared)
    return Routing(torch.cat([balance[..., :1] * ours, balance[..., 1:] * chosen], -1), share, on)


@dataclass(frozen=True)
class RoutedHeads(HeadEdit):
    """Scales each token's heads by a learned router: z_h ← g_h(x) z_h, 0 for heads it leaves out.

    Mixture of heads (MoH, Jin et al. 2024, arXiv 2410.11842, §3.2). The first heads of a layer are
    shared, n_s of them, and always on; of the others each token keeps k. With x the residual stream
    that enters the layer, divided by its root mean square,

        shared   g_h = a_1 · n_s softmax(W_s x)_h
        routed   g_h = a_2 · k softmax(W_r x)_h / Σ_kept softmax(W_r x)    the k largest; else 0
        balance  (a_1, a_2) = 2 softmax(W_b x)                   (1, 1) without shared ones

    With `straight` kept and shared heads have g = 1 (MoH-LLaMA3), and W_r the gradient of the soft
    gates (straight-through). `interp.nn.MixtureOfHeads` learns the weights. Of zero weights all
    gates of kept heads are 1, and equal routed heads are kept in no order of theirs.

    The paper's x is what the attention reads, after its norm; a norm's own factors are part of W
    here, so that no architecture's norm must be known.

    Args:
        weights: (layers, heads + 2, d_model): of each layer the rows of W_s, W_r and W_b, in this
            order; a tensor through which gradients flow, or nested lists.
        keep: how many routed heads a token keeps: a number of heads (int), or a share of all of a
            layer's (float).
        shared: share of the heads that are always on, the first ones.
        straight: on or off instead of soft gates.
        scope: "all", "prefill" or "decode".

    Misleads:
        A router's choice says where training put the heads' work, not which heads mattered before
        it: compare with a fixed choice that was trained as long. On pocket-llama that did as well
        (.025 nats lost, the router .032), and the longest query better (.002).

    Raises:
        EditError: weights of another shape than the model's, numbers out of range; in use, a
            TransformerLens model, whose residual stream is not seen.

    Example:
        >>> router = torch.zeros(4, 8 + 2, 128)
        >>> router[:, 6] = 1.0  # among the routed heads 4 … 7
        >>> edit = interp.edits.RoutedHeads(router, keep=1, straight=True)
        >>> with model.edit(edit), model.capture_z() as z:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> (z[1] != 0).any(-1).sum(-1)
        tensor([[5, 5, 5, 5, 5, 5, 5, 5]])
    """

    weights: Any
    keep: int | float = 0.25
    shared: float = 0.5
    straight: bool = False
    scope: Scope = "all"
    heads: tuple[Head, ...] | None = field(default=None, init=False, repr=False)

    name = "routed_heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            given = isinstance(self.weights, torch.Tensor)
            weights = self.weights if given else torch.tensor(self.weights, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise EditError(
                f"The weights of routed_heads are numbers, not {quoted(self.weights)}."
            ) from None
        if weights.ndim != 3 or not weights.is_floating_point() or weights.shape[1] < 3:
            raise EditError(
                "The weights of routed_heads are (layers, heads + 2, d_model) floats, not "
                f"{quoted(self.weights)}."
            )
        if not bool(torch.isfinite(weights.detach()).all()):
            raise EditError("The weights of routed_heads are finite numbers.")
        object.__setattr__(self, "weights", weights)
        if not isinstance(self.straight, bool):
            raise EditError(
                f"straight of routed_heads is true or false, not {quoted(self.straight)}."
            )
        object.__setattr__(self, "keep", real(self.keep, "keep of routed_heads"))
        object.__setattr__(self, "shared", real(self.shared, "shared of routed_heads"))
        least = 1 if isinstance(self.keep, int) else 0
        if self.keep < least or (isinstance(self.keep, float) and not 0 < self.keep <= 1):
            raise EditError(
                "routed_heads keeps a number of heads from 1 up (an int), or a share above 0 (to "
                f"1.0), not {self.keep}."
            )
        if not 0 <= self.shared < 1:
            raise EditError(
                f"The shared part of routed_heads is from 0 to less than 1, not {self.shared}."
            )
        if math.ceil(self.shared * (weights.shape[1] - 2) - 1e-9) >= weights.shape[1] - 2:
            raise EditError(
                f"With {self.shared} of {weights.shape[1] - 2} heads shared none is routed."
            )

    @property
    def needs_hidden(self) -> bool:
        return True

    def check_model(self, model: Model) -> None:
        for site in model.sites:
            if site.is_main and site.n_heads != self.weights.shape[1] - 2:
                raise EditError(
                    f"routed_heads has weights for {self.weights.shape[1] - 2} heads; {site.place} "
                    f"of {model.name} has {site.n_heads}."
                )
        if self.weights.shape[0] != model.n_layers:
            raise EditError(
                f"routed_heads has weights for {self.weights.shape[0]} layers; {model.name} has "
                f"{model.n_layers}."
            )

    def routing(self, call: AttentionCall) -> Routing:
        """What the router says of a call's tokens: gates (batch, queries, heads)."""
        if call.hidden is None:
            raise EditError(
                "routed_heads reads the residual stream, which is not seen here (TransformerLens "
                "models, other towers); load the HuggingFace model."
            )
        weights = self.weights[call.site.layer].to(call.hidden.device)  # (heads + 2, d_model)
        if weights.shape[1] != call.hidden.shape[-1]:
            raise EditError(
                f"routed_heads has weights for a stream of {weights.shape[1]}, and that of "
                f"{call.site.place} has {call.hidden.shape[-1]}."
            )
        shared, kept = head_counts(self.keep, self.shared, call.site.n_heads)
        return routing(weights, call.hidden, shared, kept, self.straight)

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        gates = self.routing(call).gates.to(z.dtype)  # (batch, queries, heads)
        return z * gates[..., None]

    def route(self, site: Site) -> str:
        shared, kept = head_counts(self.keep, self.shared, site.n_heads)
        return (
            f"routed_heads: {shared} heads always on and {kept} of the others for each token, by a "
            "learned router; z times its gates"
        )
