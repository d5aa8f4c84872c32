"""What edits do inside one attention call, and to which of its query rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from interp_kernels import Steer


@dataclass(frozen=True)
class Steered:
    """What an edit does inside one attention call, and to which query rows (start, stop)."""

    steer: Steer
    rows: tuple[int, int]


def cut(steered: Steered, start: int, stop: int) -> Steer:
    """The steer of rows start:stop of the call: what it says a row, cut."""

    def rows(value: torch.Tensor | None, dim: int) -> torch.Tensor | None:
        return (
            value
            if value is None or value.shape[dim] == 1
            else value.narrow(dim, start, stop - start)
        )

    steer = steered.steer
    whole = steer.rule
    rules = () if whole is None else whole if isinstance(whole, tuple) else (whole,)
    cut = tuple(replace(rule, rows=rows(rule.rows, 1)) for rule in rules)
    return replace(steer, temper=rows(steer.temper, 2), gain=rows(steer.gain, 2), rule=cut or None)


def gains(z: torch.Tensor, steers: Sequence[Steered]) -> torch.Tensor:
    """z (batch, queries, heads, d) times the steers' gains."""
    for s in steers:
        if s.steer.gain is not None:
            start, stop = s.rows
            factor = torch.ones_like(z[..., 0])  # (batch, queries, heads)
            gain = s.steer.gain.to(z).transpose(1, 2).expand(factor.shape)
            factor[:, start:stop] = gain[:, start:stop]
            z = z * factor[..., None]
    return z
