"""Give chosen tokens at least a share of a row's attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
class SpotLight(HeadEdit):
    """Raises the attention to chosen keys where it is below a target share, rows renormalised.

    With ψ = Σ_{k in S} a_k of a row, where 0 < ψ < ψ* the logits of S get ln(ψ*/ψ), so that

        a_S' = ψ* / (1 + ψ* − ψ)        (a row that has ψ ≥ ψ*, or sees none of S, stays)

    (SpotLight, arXiv 2505.12025.) a_S' is a little below ψ*, since the row is normalised after.

    Args:
        keys: the set S: "initial", a span (start, stop) or a list of positions counted from each
            sample's first real token, a text of the prompt, Span("the instruction"), or a (batch,
            slots) bool tensor.
        target: ψ*, 0 … 1.
        heads: None for all.
        scope: "all", "prefill" or "decode".
        queries: (start, stop) tokens; None for all rows.

    Misleads:
        It lifts the rows that look least at the keys, and leaves those that read them as they are.
        On SmolLM2 targets of .1 to .3 made a sentence count less, where a plain gain on it
        (`ScaleTokens`) made it count more. Compare it with a span of as many other tokens.

    Raises:
        EditError: ψ* outside 0 … 1, or keys that are none.

    Example:
        >>> edit = interp.edits.SpotLight((2, 5), target=0.5)
        >>> with model.edit(edit), model.observe("topk", topk=12, stage="after") as seen:
        ...     _ = model.logits(torch.arange(12)[None])
        >>> index, weight = seen[2].topk_index[0, 0, 11], seen[2].topk_prob[0, 0, 11]
        >>> bool(weight[(index >= 2) & (index < 5)].sum() > 1 / 3)
        True
    """

    keys: KeySet
    target: Number = 0.3
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"
    queries: tuple[int, int | None] | None = None

    name = "spotlight"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keys", check(self.keys))
        object.__setattr__(self, "target", number(self.target, "The target of spotlight"))
        if not 0 <= self.target <= 1:
            raise EditError(
                f"The target of spotlight is a share of attention, 0 to 1, not {self.target}."
            )

    def is_identity(self) -> bool:
        return fixed(self.target, 0) or super().is_identity()

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        heads = set(self.heads_at(call.site))
        least = vector(
            [self.target if h in heads else 0.0 for h in range(call.site.n_heads)],
            call.value.device,
        )
        least = torch.stack([torch.zeros_like(least), least], -1)  # (heads, 2): others, S
        # a head that is not meant is not renormalised either: with nothing raised Σ a = 1
        rule = Rule(torch.ones_like(least), least, renormalise=True, rows=self.query_rows(call))
        return Steer(rule=rule, **groups(call, [self.keys]))

    def route(self, site: Site) -> str:
        return f"spotlight {self.target:g}: a rule that gives a group a least mass, renormalised"
