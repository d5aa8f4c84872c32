"""SoftPAG: blend attention with the identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp.edits.values import ValueEdit
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_kernels import Request, Result, Steer

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class SoftPAG(ValueEdit):
    """Blends attention with the identity: A ← (1 − u)·A + u·I.

    Each token looks that much more at itself only (Ahn et al. 2025, arXiv 2506.10978). For
    guidance, extrapolate away from a prediction made under it.

    Args:
        u: 0 … 1, for all `heads`, or head → u; tensors of one number take gradients.
        heads: None for all; with a mapping, its heads.
        scope: "all", "prefill" or "decode".

    Misleads:
        It is half of a method: guidance goes away from what is predicted under it. Alone it harms
        (pocket-llama's loss +.009 nats at u = .1). The paper's conventions of scale are not
        verified.

    Raises:
        EditError: u outside [0, 1].

    Example:
        >>> edit = interp.edits.SoftPAG(1.0)
        >>> with model.edit(edit), model.observe("argmax", stage="after") as seen:
        ...     _ = model.logits(torch.arange(6)[None])
        >>> seen[2].argmax[0, 0].tolist()
        [0, 1, 2, 3, 4, 5]
    """

    u: Any = 1.0
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"

    name = "soft_pag"
    value_field = "u"
    neutral = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= u <= 1 for u in self.numbers()):
            raise EditError(f"u of soft_pag is between 0 and 1, not {self.u}.")

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        return Steer(blend=self.per_head(call.site, call.value.device))

    def route(self, site: Site) -> str:
        return "soft_pag: the output blended with each query's own value"
