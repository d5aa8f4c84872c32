"""What an edit is to the tap: something that changes the per-head output z of attention calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from interp_hooks.call import AttentionCall, Site
from interp_kernels import Request, Result, Steer

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

Scope = Literal["all", "prefill", "decode"]


class Edit(ABC):
    """A declarative change of attention. Subclasses are frozen dataclasses (in `interp.edits`).

    An edit is bound to a model once, on entry (`bind` checks heads and precomputes), then asked per
    call.
    """

    scope: Scope = "all"

    @property
    def needs_hidden(self) -> bool:
        """Whether calls must carry `hidden`, the residual stream that enters their layer."""
        return False

    def bind(self, model: HookedModel) -> None:  # noqa: B027 (most edits need no check)
        """Check that the edit applies to `model`; raise `EditError` or `HeadError` if not."""

    def is_identity(self) -> bool:
        """True if the parameters change nothing; then the model's own path stays untouched
        (bit-equal)."""
        return False

    @abstractmethod
    def touches(self, call: AttentionCall) -> bool:
        """Whether this call is changed at all (its layer, tower and scope)."""

    def before(self, call: AttentionCall) -> AttentionCall:
        """The call with changed queries, keys, values, sinks or mask; by default the call
        itself."""
        return call

    def steer(self, call: AttentionCall, look: Callable[[Request], Result]) -> Steer | None:
        """What changes inside the attention call: logits, a rule over groups of keys, gains; None
        for nothing.

        Labels, spans and biases are in the call's key columns. `look` gives statistics of the
        call's weights as the edits before this one leave them.
        """
        return None

    def rows(self, call: AttentionCall) -> tuple[int, int] | None:
        """The query rows (start, stop) that `steer` is for; None for all."""
        return None

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        """The new z (batch, queries, heads, d_head); must not write into the z it is given."""
        return z

    def in_scope(self, call: AttentionCall) -> bool:
        """Whether `call` belongs to the edit's scope (prefill: everything that is not a one-token
        decode step)."""
        return self.scope == "all" or (self.scope == "decode") == call.is_decode

    def route(self, site: Site) -> str:
        """Which route it takes there, for `explain`."""
        return "epilogue on z, after the attention kernel"
