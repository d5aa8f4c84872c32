"""Move attention from some tokens to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interp.edits.head_edit import HeadEdit
from interp.edits.keys import KeySet, check, groups, overlap
from interp.edits.values import Number, fixed, number, vector
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_kernels import Request, Result, Rule, Steer

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class MoveMass(HeadEdit):
    """Moves attention between sets of keys: donors give the share p of their weight to receivers.

    Receivers share it in proportion to what they have,

        a_d' = (1 − p) a_d        a_r' = a_r·(1 + p m_D / m_R)        m_S = Σ_{k in S} a_k

    and all other weights stay. A row in which no receiver is visible stays as it is.

    Args:
        donors, receivers: disjoint sets of keys: "initial", a span (start, stop) or a list of
            positions counted from each sample's first real token, a text of the prompt,
            Span("the instruction"), or a (batch, slots) bool tensor (where two such sets share a
            key, it receives).
        share: p, 0 … 1.
        heads: None for all.
        scope: "all", "prefill" or "decode".
        queries: (start, stop) tokens; None for all rows.

    Misleads:
        A sink's value is small, so what it gives up was worth little, and what the receivers get is
        worth more: the edit turns them up rather than the sink down.

    Raises:
        EditError: p outside [0, 1], or donors that are receivers too.

    Example:
        >>> edit = interp.edits.MoveMass("initial", (2, 5), share=1.0)
        >>> with model.edit(edit), model.observe("topk", topk=12, stage="after") as seen:
        ...     _ = model.logits(torch.arange(12)[None])
        >>> first = seen[2].topk_index[0, 0, 11] == 0  # where the last row has the initial token
        >>> float(seen[2].topk_prob[0, 0, 11][first])
        0.0
    """

    donors: KeySet
    receivers: KeySet
    share: Number = 1.0
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"
    queries: tuple[int, int | None] | None = None

    name = "move_mass"
    crosses = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("donors", "receivers"):
            object.__setattr__(self, name, check(getattr(self, name)))
        object.__setattr__(self, "share", number(self.share, "The share of move_mass"))
        if not 0 <= self.share <= 1:
            raise EditError(f"The share of move_mass is between 0 and 1, not {self.share}.")
        if overlap(self.donors, self.receivers):
            raise EditError(
                "Donors and receivers of move_mass have tokens in common; a token gives or "
                "receives."
            )

    def is_identity(self) -> bool:
        return fixed(self.share, 0) or super().is_identity()

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        heads, device = set(self.heads_at(call.site)), call.value.device
        factors = vector(
            [1 - self.share if h in heads else 1.0 for h in range(call.site.n_heads)], device
        )
        one = torch.ones_like(factors)
        keep = torch.stack([one, factors, one], -1)  # (heads, 3): others, donors, receivers
        receive = torch.tensor([[0.0, 0.0, 1.0]], device=device)
        rule = Rule(keep, receive, rows=self.query_rows(call))
        return Steer(rule=rule, **groups(call, [self.donors, self.receivers]))

    def route(self, site: Site) -> str:
        return f"move_mass {self.share:g}: a rule over donors, receivers and the rest"
