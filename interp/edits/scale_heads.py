"""Multiply the output of heads by a gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.fold import Affine
from interp.edits.head_edit import SCOPES, HeadEdit
from interp.edits.values import Number, fixed, head_values, vector
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head, parse_heads

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model


@dataclass(frozen=True)
class ScaleHeads(HeadEdit):
    """Scales the output of heads: z_h ← γ_h z_h before W_O.

    γ = 1 is the identity and leaves the model's own path untouched.

    Args:
        gains: head → γ, heads in any spelling, e.g. ``{"L5H1": 0.0, (3, 2): 1.5}``; or heads alone,
            ``ScaleHeads(["L5H1", (3, 2)], 0.0)``. Tensors of one number take gradients.
        factor: γ of all the heads, where `gains` names heads alone.
        scope: "all", "prefill" or "decode".
        queries: (start, stop) tokens; None for all rows.

    Misleads:
        A gain that helps may help in any head. On smol-llava the 16 heads that gaze best, × 2,
        change made-up objects no more than 16 random ones.

    Raises:
        EditError: a gain that is not finite, a head named twice, heads without a factor, or a
            factor beside gains.

    Example:
        >>> ids = torch.arange(8)[None]
        >>> with model.edit(interp.edits.ScaleHeads({"L0H3": 2.0})), model.capture_z() as scaled:
        ...     _ = model.logits(ids)
        >>> with model.capture_z() as own:
        ...     _ = model.logits(ids)
        >>> bool(torch.allclose(scaled[0][:, :, 3], 2 * own[0][:, :, 3]))
        True
    """

    gains: InitVar[Any]
    factor: InitVar[Any] = None
    scope: Scope = "all"
    queries: tuple[int, int | None] | None = None
    heads: tuple[Head, ...] = field(init=False)
    values: tuple[Number, ...] = field(init=False)

    name = "scale_heads"
    crosses = True

    def __post_init__(self, gains: Any, factor: Any) -> None:  # type: ignore[override]
        if isinstance(factor, str) and factor in SCOPES:  # the scope stood second once
            if not isinstance(self.scope, str):
                object.__setattr__(self, "queries", self.scope)
            object.__setattr__(self, "scope", factor)
            factor = None
        by_head = head_values(_by_head(gains, factor), "Each gain of scale_heads")
        object.__setattr__(self, "heads", tuple(by_head))
        object.__setattr__(self, "values", tuple(by_head.values()))
        super().__post_init__()

    def is_identity(self) -> bool:
        return all(fixed(g, 1) for g in self.values)

    def gains_at(self, site: Site) -> list[Number]:
        """γ of each head at a site."""
        here = set(self.heads_at(site))
        by_head = {
            head.head: gain
            for head, gain in zip(self.heads, self.values, strict=True)
            if head.head in here and head.layer == site.layer
        }
        return [by_head.get(h, 1.0) for h in range(site.n_heads)]

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        return scale(z, vector(self.gains_at(call.site), z.device), self.query_rows(call))

    def folded(self, model: Model) -> Mapping[Site, Affine]:
        self.check_unbounded()
        self.check_model(model)
        return {
            site: Affine(torch.tensor([float(g) for g in self.gains_at(site)], dtype=torch.float64))
            for site in model.sites
            if self.at(site)
        }

    def fields(self) -> dict[str, Any]:
        gains = {str(h): float(g) for h, g in zip(self.heads, self.values, strict=True)}
        return dict(
            gains=gains,
            scope=self.scope,
            queries=None if self.queries is None else list(self.queries),
        )


def _by_head(gains: Any, factor: Any) -> Mapping[Any, Number]:
    """Head → gain, of a mapping or of heads and one factor. Raises `EditError`, `HeadError`."""
    if isinstance(gains, Mapping):
        if factor is not None:
            raise EditError(
                f"scale_heads takes gains head by head, or heads and a factor, not the factor "
                f"{factor!r} beside gains."
            )
        return gains
    if gains is None:
        raise EditError(
            'scale_heads needs its heads: {"L5H1": 0.0}, or ScaleHeads(["L5H1"], 0.0); all of a '
            "model are model.heads."
        )
    heads = parse_heads(gains)
    if factor is None:
        raise EditError(
            "scale_heads needs a factor for a list of heads, like "
            f"ScaleHeads([{', '.join(repr(str(h)) for h in heads[:2]) or repr('L5H1')}], 0.0)."
        )
    return dict.fromkeys(heads, factor)


def scale(z: torch.Tensor, gains: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """z (batch, queries, heads, d) × gains (heads,), in `rows` (batch, queries); None for all."""
    factor = gains.to(z.dtype)[:, None]  # (heads, 1)
    if rows is not None:
        factor = torch.where(rows[..., None, None], factor, 1)
    return z * factor
