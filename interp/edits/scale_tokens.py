"""Give chosen tokens more or less weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.head_edit import HeadEdit
from interp.edits.keys import KeySet, check, groups
from interp.edits.values import Number, fixed, number, vector
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_kernels import Request, Result, Rule, Steer

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class ScaleTokens(HeadEdit):
    """Scales the attention to chosen keys, rows renormalised: a_k ← g_k a_k / Σ g a.

    A[q, S] is multiplied by the gain and each row renormalised, the same as adding ln gain to the
    logits of S.

    Args:
        keys: the set S: "initial", a span (start, stop) or a list of positions counted from each
            sample's first real token, a text of the prompt, Span("the instruction"), or a (batch,
            slots) bool tensor.
        gain: ≥ 0; 0 hides the tokens (z = 0 where nothing else is visible).
        heads: None for all.
        scope: "all", "prefill" or "decode".
        queries: (start, stop) tokens; None for all rows.

    Misleads:
        The other keys of the row get what these lose: to hide a sink turns up everything else.
        Where some heads or layers still see the tokens, their content travels on through those.

    Raises:
        EditError: a gain below 0, or keys that are none.

    Example:
        >>> edit = interp.edits.ScaleTokens((2, 5), gain=0.0)
        >>> with model.edit(edit), model.observe("received", stage="after") as seen:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> (seen[2].received[0, 0] > 0).tolist()
        [True, True, False, False, False, True, True, True]
    """

    keys: KeySet
    gain: Number
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"
    queries: tuple[int, int | None] | None = None

    name = "scale_tokens"
    crosses = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keys", check(self.keys))
        object.__setattr__(self, "gain", number(self.gain, "The gain of scale_tokens"))
        if self.gain < 0:
            raise EditError(f"The gain of scale_tokens is a number from 0 up, not {self.gain}.")

    def is_identity(self) -> bool:
        return fixed(self.gain, 1) or super().is_identity()

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        heads = set(self.heads_at(call.site))
        gains = vector(
            [self.gain if h in heads else 1.0 for h in range(call.site.n_heads)], call.value.device
        )
        return reweigh(groups(call, [self.keys]), gains, self.query_rows(call))

    def route(self, site: Site) -> str:
        return f"scale_tokens × {self.gain:g}: a rule over two groups of keys, renormalised"


def reweigh(where: dict[str, Any], gains: torch.Tensor, rows: torch.Tensor | None = None) -> Steer:
    """Group 1 of `where` × gains (heads,), renormalised, in `rows` (batch, queries); None for
    all."""
    keep = torch.stack([torch.ones_like(gains), gains], -1)  # (heads, 2)
    return Steer(rule=Rule(keep, renormalise=True, rows=rows), **where)
