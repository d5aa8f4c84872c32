"""Keys that a cache gives out while it holds others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from interp_hooks.call import Holder
from interp_hooks.errors import TapError

#: what may be asked of held keys outside the tap: their sizes
_HARMLESS = {"__get__", "size", "dim", "numel", "is_floating_point", "is_complex", "get_device"}


class HeldKeys(torch.Tensor):
    """The keys (batch, kv_heads, new, d) of the tokens of one call, whose `holder` has the others.
    Nothing but the tap can compute with them."""

    holder: Holder | None = None

    @staticmethod
    def wrap(key: torch.Tensor, holder: Holder) -> HeldKeys:
        held = key.as_subclass(HeldKeys)
        held.holder = holder
        return held

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") not in _HARMLESS:
            raise TapError(
                "A cache that holds keys head by head works with a model that interp has loaded "
                "(model.generate, model.logits) and that attends with the very keys its cache "
                "gives out; this one computed with them itself."
            )
        return super().__torch_function__(func, types, args, kwargs or {})


def unwrapped(key: torch.Tensor) -> tuple[torch.Tensor, Holder | None]:
    """The plain tensor, and who holds the keys before it; None of ordinary keys."""
    if not isinstance(key, HeldKeys):
        return key, None
    with torch._C.DisableTorchFunctionSubclass():
        return key.as_subclass(torch.Tensor), key.holder
