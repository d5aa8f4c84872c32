"""Numbers of edits: one for all heads or head by head, plain or as tensors that gradients flow
through."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from interp.edits.head_edit import HeadEdit, same_tower
from interp.errors import EditError
from interp_hooks.call import Site
from interp_hooks.heads import Head
from interp_hooks.whole_numbers import quoted

Number = Any  # a float, or a tensor of one number


def number(value: Number, what: str) -> Number:
    """A finite float, or the tensor of one number given, through which gradients flow. Raises
    `EditError`."""
    if isinstance(value, torch.Tensor):
        if value.ndim or not value.is_floating_point():
            raise EditError(
                f"{what} is a number, or a tensor of one, not of shape {tuple(value.shape)}."
            )
        plain = value.item()
    else:
        try:
            plain = value = float(value if not isinstance(value, str) else "no number")
        except (TypeError, ValueError):
            raise EditError(
                f"{what} is a number, or a tensor of one, not {quoted(value)}."
            ) from None
    if not math.isfinite(plain):
        raise EditError(f"{what} must be finite, got {plain}.")
    return value


def fixed(value: Number, at: float) -> bool:
    """Whether it is this number, and not one that a gradient is asked for."""
    return bool(value == at) and not (isinstance(value, torch.Tensor) and value.requires_grad)


def vector(values: Sequence[Number], device: torch.device) -> torch.Tensor:
    """(n,): float32, or the dtype of the tensors among them; gradients flow."""
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if not tensors:
        return torch.tensor(values, dtype=torch.float32, device=device)
    return torch.stack([torch.as_tensor(v, dtype=tensors[0].dtype, device=device) for v in values])


def head_values(values: Number | Mapping[Any, Number], what: str) -> dict[Head, Number] | Number:
    """A number for all heads, or head → number with heads in any spelling. Raises `EditError` if
    not finite."""
    if isinstance(values, Mapping):
        by_head = {Head.parse(h): number(v, what) for h, v in values.items()}
        if len(by_head) < len(values):
            raise EditError(
                f"{what} has a head twice, in two spellings: {', '.join(map(str, values))}."
            )
        return by_head
    return number(values, what)


class ValueEdit(HeadEdit):
    """A `HeadEdit` with one number for all its heads, or head → number, in the field named
    `value_field`. Where the number is a tensor, gradients flow through it."""

    value_field: ClassVar[str]
    neutral: ClassVar[float] = 1.0

    @property
    def values(self) -> Any:
        """The number, or head → number."""
        return getattr(self, self.value_field)

    def __post_init__(self) -> None:
        values = head_values(self.values, f"{self.value_field} of {self.name}")
        if isinstance(values, dict) and self.heads is not None:
            raise EditError(
                f"{self.name} takes heads, or {self.value_field} head by head, not both."
            )
        object.__setattr__(self, self.value_field, values)
        super().__post_init__()

    @property
    def concerned(self) -> tuple[Head, ...] | None:
        return tuple(self.values) if isinstance(self.values, dict) else self.heads

    def numbers(self) -> list[Number]:
        """All of them."""
        return list(self.values.values()) if isinstance(self.values, dict) else [self.values]

    def is_identity(self) -> bool:
        return super().is_identity() or all(fixed(v, self.neutral) for v in self.numbers())

    def per_head(self, site: Site, device: torch.device) -> torch.Tensor:
        """(query heads,): the number of each head at this site, `neutral` for those not
        concerned."""
        by_head: dict[int, Number] = {}
        if isinstance(self.values, dict):
            for head, value in self.values.items():
                if head.layer == site.layer and same_tower(head, site):
                    by_head[head.head] = value
        else:
            by_head = dict.fromkeys(self.heads_at(site), self.values)
        return vector([by_head.get(h, self.neutral) for h in range(site.n_heads)], device)
