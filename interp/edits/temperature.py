"""Temperature: sharper or flatter attention, by head and by position."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.checks import real
from interp.edits.keys import query_positions
from interp.edits.values import ValueEdit
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_kernels import Request, Result, Steer

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class Temperature(ValueEdit):
    """Divides the logits by a temperature before the softmax: s ← s / τ.

    (TempScale, Zhou et al. 2024, arXiv 2410.24200.) With ``rule="ssa"`` they are also multiplied by
    t(n) for the n-th token,

        t(n) = 1 + e^(−e^β)·ln n        n = 1 for each sample's first real token

    (position temperature of selective self-attention, Zhang et al. 2024, arXiv 2411.12892). After
    soft-capping; sink logits stay as they are.

    Logits come before weights: whatever the order of the edits, it acts before those that change
    weights.

    Args:
        tau: one τ > 0 for all `heads`, or head → τ; tensors of one number take gradients. τ < 1
            sharpens.
        heads: None for all; with a mapping, its heads.
        scope: "all", "prefill" or "decode".
        rule: None or "ssa".
        beta: β of the rule, 2.0 where fine-tuning starts in the paper, 1.5 for GPT-2.

    Misleads:
        Small gains come with a price elsewhere: on SmolLM2 τ = 1.25 gains .04 on four-shot reviews
        and loses half of the needles. A τ chosen on the problems that it is judged on is no
        finding.

    Raises:
        EditError: τ ≤ 0, or another rule.

    Example:
        >>> def entropy(*edits):
        ...     with model.edit(*edits), model.observe("entropy", stage="after") as seen:
        ...         _ = model.logits(torch.arange(12)[None])
        ...     return float(seen[0].entropy.mean())
        >>> entropy(interp.edits.Temperature(0.5)) < entropy()
        True
    """

    tau: Any = 1.0
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"
    rule: str | None = None
    beta: float = 2.0

    name = "temperature"
    crosses = True
    value_field = "tau"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.numbers(), default=1.0) <= 0:
            raise EditError(f"τ of temperature is above 0, not {self.tau}.")
        if self.rule not in (None, "ssa"):
            raise EditError(f'The rule of temperature is "ssa" or none, not {self.rule!r}.')
        object.__setattr__(self, "beta", real(self.beta, "β of temperature"))
        if not math.isfinite(self.beta):
            raise EditError(f"β of temperature must be finite, got {self.beta}.")

    def is_identity(self) -> bool:
        return self.concerned == () or (self.rule is None and super().is_identity())

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        device = call.value.device
        temper = 1 / self.per_head(call.site, device)[None, :, None]  # (1, heads, 1)
        if self.rule == "ssa":
            n = (query_positions(call) + 1).clamp_min(1)[:, None]  # (batch or 1, 1, queries)
            grown = 1 + math.exp(-math.exp(self.beta)) * n.to(temper.dtype).log()
            temper = torch.where(self.chosen(call.site, device)[:, None], temper * grown, 1.0)
        return Steer(temper=temper)

    def route(self, site: Site) -> str:
        return f"temperature{' ssa' if self.rule else ''}: logits scaled before the softmax"
