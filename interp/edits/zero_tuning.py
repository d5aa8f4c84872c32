"""ZeroTuning: turn the initial token up or down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp.edits.keys import groups
from interp.edits.scale_tokens import reweigh
from interp.edits.values import ValueEdit
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_kernels import Request, Result, Steer

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class ZeroTuning(ValueEdit):
    """Scales the attention to the initial token, rows renormalised: a₀ ← γ a₀ / D.

    a₀' = γ a₀ / D and a_i' = a_i / D, D = (γ − 1) a₀ + 1 (Han et al. 2025, arXiv 2505.11739). The
    exact ln γ form, in flash attention; the initial token is each sample's first real one, also
    under left padding, and is left alone where a sliding window has passed it.

    Args:
        gamma: one γ > 0 for all `heads`, or head → γ; tensors of one number take gradients. γ > 1
            flattens the rest, γ < 1 sharpens it.
        heads: None for all; with a mapping, its heads.
        scope: "all" (the paper's), "prefill" or "decode".
        queries: (start, stop) tokens; None for all rows.

    Misleads:
        Without a strong sink at the first token there is nothing to turn (pocket-llama). On SmolLM2
        γ > 1, the published direction for classification, goes down where it moves anything. A BOS
        put in front moves it.

    Raises:
        EditError: γ ≤ 0.

    Example:
        >>> def initial(*edits):
        ...     with model.edit(*edits), model.observe("received", stage="after") as seen:
        ...         _ = model.logits(torch.arange(8)[None])
        ...     return seen[0].received[0, :, 0]
        >>> bool((initial(interp.edits.ZeroTuning(2.0)) > initial()).all())
        True
    """

    gamma: Any = 1.5
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"
    queries: tuple[int, int | None] | None = None

    name = "zero_tuning"
    value_field = "gamma"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.numbers(), default=1.0) <= 0:
            raise EditError(
                f"γ of zero_tuning is above 0, not {self.gamma}; to take the token out use "
                "scale_tokens."
            )

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        gains = self.per_head(call.site, call.value.device)
        return reweigh(groups(call, ["initial"]), gains, self.query_rows(call))

    def route(self, site: Site) -> str:
        return "zero_tuning: a rule over the initial token and the rest, renormalised"
