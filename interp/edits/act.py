"""ACT: cut down the attention sinks of a prompt, head by head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.head_edit import HeadEdit
from interp.edits.values import Number, fixed, number, vector
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_kernels import Received, Request, Result, Rule, Steer

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class ACT(HeadEdit):
    """Attention calibration (ACT): keys that receive too much keep the share β of their weight.

    What they give up goes to all other keys in proportion to theirs, in each head (Yu et al., ICML
    2024, arXiv 2406.15765),

        c_k = mean of A[q, k] over the rows q that see k     S = {k > 0 : c_k > threshold}
        a_k' = β a_k on S        a_k' = a_k·(1 + (1 − β) m_S / (1 − m_S)) elsewhere,  m_S = Σ_S a.

    S is found in the prompt, from the head's own weights, in a first pass over the keys; position 0
    (each sample's first real token) is never in it. Later tokens are seen by c_k, so losses under
    ACT are for continuations only.

    Args:
        beta: 0 … 1; a tensor of one number takes gradients.
        alpha: threshold α/N, N the sample's real tokens.
        threshold: an absolute threshold instead of α/N (the code's 0.1).
        heads: None for all.
        min_rows: keys that fewer rows see are left out.
        scope: "prefill" (the paper's): decode steps see the model's own weights.
        preset: "paper" (None): α/N; "code": the released code's absolute threshold, 0.1.
            `ACT.preset("code", heads)` is the same.

    Misleads:
        Sinks are found with the help of later rows, so losses under ACT are of continuations only.
        A threshold of 5/N flags the last keys of plain uniform attention too. In all heads it
        leaves SmolLM2 hardly a needle: the choice of heads is part of the method.

    Raises:
        EditError: β outside [0, 1], α ≤ 0; in use, a prompt that comes in several forwards.

    Example:
        >>> edit = interp.edits.ACT(beta=0.0, threshold=0.5)  # the last key's c is 0.57 here
        >>> with model.edit(edit), model.observe("received", stage="after") as seen:
        ...     _ = model.logits(torch.arange(12)[None])
        >>> float(seen[2].received[0, 0, 11])
        0.0
    """

    beta: Number = 0.4
    alpha: float = 5.0
    threshold: float | None = None
    heads: tuple[Head, ...] | None = None
    min_rows: int = 1
    scope: Scope = "prefill"
    preset: InitVar[str | None] = None

    name = "act"

    presets = {"paper": {"threshold": None}, "code": {"threshold": 0.1}}

    def __post_init__(self, preset: Any) -> None:  # type: ignore[override]
        super().__post_init__()
        # `replace` hands on what it finds under an argument's name: here the class method
        usual = self.preset_settings(None if callable(preset) else preset)
        if self.threshold is None:
            object.__setattr__(self, "threshold", usual.get("threshold"))
        object.__setattr__(self, "beta", number(self.beta, "β of act"))
        if not 0 <= self.beta <= 1:
            raise EditError(f"β of act is between 0 and 1, not {self.beta}.")
        object.__setattr__(self, "alpha", self._number("alpha"))
        object.__setattr__(self, "threshold", self._number("threshold"))
        object.__setattr__(self, "min_rows", self._count("min_rows"))
        if (
            self.alpha is None
            or self.alpha <= 0
            or (self.threshold is not None and self.threshold <= 0)
        ):
            raise EditError("α and the threshold of act are above 0.")
        if self.min_rows is None or self.min_rows < 1:
            raise EditError(
                f"min_rows of act counts query rows, from 1; it is not {self.min_rows!r}."
            )
        if self.scope != "prefill":
            raise EditError("act finds its sinks in a prompt; its scope is prefill.")

    def is_identity(self) -> bool:
        return fixed(self.beta, 1) or super().is_identity()

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        if call.mask.q_start > 0:
            raise EditError(
                "act needs the whole prompt in one forward: its sinks come from all rows."
            )
        sinks = self.sinks(call, measure)  # (batch, heads, keys) bool
        keep = vector([1.0, self.beta], sinks.device)[None]  # (1, groups)
        receive = torch.tensor([[1.0, 0.0]], device=sinks.device)
        return Steer(labels=sinks.long(), rule=Rule(keep, receive))

    def sinks(self, call: AttentionCall, measure: Callable[[Request], Result]) -> torch.Tensor:
        """(batch, heads, keys) bool: S of each head concerned, nothing in the others."""
        stats = measure(Request(received={"act": Received()}, out=False)).stats
        mean, count = (
            stats["received:act"],
            stats["received_count:act"],
        )  # (batch, heads, keys), (batch, 1, keys)
        # a dense mask names no padding, but no real row sees any
        real = count[:, 0] > 0 if call.mask.keys is None else call.mask.keys
        if self.threshold is None:
            limit = self.alpha / real.sum(-1)[:, None, None]  # α / N
        else:
            limit = torch.tensor(self.threshold, device=mean.device)
        column = torch.arange(call.n_keys, device=mean.device)
        starts = 0 if call.mask.starts is None else call.mask.starts.to(mean.device)[:, None, None]
        later = column + call.mask.k_start > starts
        return (
            (mean > limit)
            & later
            & (count >= self.min_rows)
            & self.chosen(call.site, mean.device)[:, None]
        )

    def route(self, site: Site) -> str:
        return f"act β = {self.beta:g}: attention received, then a rule over each head's sinks"


def _preset(cls: type[ACT], name: str, heads: Any = None) -> ACT:
    """ACT with the settings of a preset, "paper" or "code"."""
    return cls(heads=heads, preset=name)


# an argument of the constructor and a class method of one name: the argument comes first, since a
# dataclass takes what the class holds under it for its default
ACT.preset = classmethod(_preset)  # type: ignore[attr-defined]
