"""Edits that hold a vector for each head they change."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.checks import real
from interp.edits.head_edit import HeadEdit
from interp.errors import EditError
from interp.support.html import block
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class VectorEdit(HeadEdit):
    """Changes the output z of heads by a vector each: the base of those edits.

    Subclasses say what becomes of z (`changed`).

    Args:
        directions: head → vector (d_head,), heads in any spelling; lists or tensors, through which
            gradients flow.
        strength: a factor, of all the heads; 0 is the identity.
        scope: "all", "prefill" or "decode".
        queries: (start, stop) tokens; None for all rows.

    Raises:
        EditError: no vectors, a head twice, a vector that is not finite; in use, one that is not as
            long as a head's output.
    """

    directions: InitVar[Mapping[Any, Any]]
    strength: Any = 1.0
    scope: Scope = "all"
    queries: tuple[int, int | None] | None = None
    heads: tuple[Head, ...] = field(init=False)
    #: numbers, or a tensor where gradients are asked for
    vectors: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self, directions: Mapping[Any, Any]) -> None:  # type: ignore[override]
        if not isinstance(directions, Mapping) or not directions:
            raise EditError(
                f'{self.name} takes directions, head → vector, like {{"L5H1": v}}, not '
                f"{quoted(directions)}."
            )
        by_head = {Head.parse(head): _vector(v, head) for head, v in directions.items()}
        if len(by_head) < len(directions):
            raise EditError(
                f"directions of {self.name} have a head twice, in two spellings: "
                f"{', '.join(map(str, directions))}."
            )
        object.__setattr__(self, "heads", tuple(by_head))
        object.__setattr__(self, "vectors", tuple(by_head.values()))
        object.__setattr__(self, "strength", real(self.strength, f"strength of {self.name}"))
        super().__post_init__()

    def is_identity(self) -> bool:
        return self.strength == 0 or super().is_identity()

    def vectors_at(self, site: Site) -> dict[int, torch.Tensor]:
        """Head → its vector at a site."""
        here = set(self.heads_at(site))
        return {
            head.head: tensor(vector)
            for head, vector in zip(self.heads, self.vectors, strict=True)
            if head.layer == site.layer and head.head in here
        }

    @abstractmethod
    def changed(self, z: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """What becomes of z (batch, queries, d_head) by a head's vector (d_head,)."""

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        new = z.clone()
        for head, vector in self.vectors_at(call.site).items():
            check_width(call.site, vector.shape[0], z.shape[3])
            new[:, :, head] = self.changed(z[:, :, head], vector.to(z.device))
        rows = self.query_rows(call)
        return new if rows is None else torch.where(rows[..., None, None], new, z)

    def fields(self) -> dict[str, Any]:
        return dict(
            directions={
                str(h): tensor(v).tolist() for h, v in zip(self.heads, self.vectors, strict=True)
            },
            strength=self.strength,
            scope=self.scope,
            queries=None if self.queries is None else list(self.queries),
        )

    @property
    def phrase(self) -> str:
        heads = ", ".join(map(str, self.heads))
        return f"{type(self).__name__} {heads}; strength {self.strength:g}"

    def _repr_html_(self) -> str:
        rows = [
            [str(h), f"{float(tensor(v).norm()):.3g}"]
            for h, v in zip(self.heads, self.vectors, strict=True)
        ]
        said = " ".join((type(self).__doc__ or "").split("\n\n")[0].split())
        facts = dict(strength=self.strength, scope=self.scope, queries=self.queries)
        return block(type(self).__name__, "", facts, ["head", "length"], rows, [said])


def check_width(site: Site, width: int, wanted: int) -> None:
    """Raise `EditError` where a vector is not as long as the heads' outputs."""
    if width != wanted:
        raise EditError(
            f"A vector of {site.place} has {width} numbers, and its heads' outputs have {wanted}."
        )


def tensor(vector: Any) -> torch.Tensor:
    """(d_head,): the tensor itself, or float64."""
    if isinstance(vector, torch.Tensor):
        return vector
    return torch.tensor(vector, dtype=torch.float64)


def _vector(value: Any, head: Any) -> Any:
    """The numbers of a vector, or the tensor that gradients are asked for. Raises `EditError`."""
    try:
        given = isinstance(value, torch.Tensor)
        vector = value if given else torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise EditError(
            f"The vector of {head} is a list of numbers, not {quoted(value)}."
        ) from None
    if vector.ndim != 1 or not len(vector) or not bool(torch.isfinite(vector).all()):
        raise EditError(f"The vector of {head} is d_head finite numbers, and not {quoted(value)}.")
    return vector if vector.requires_grad else tuple(map(float, vector.tolist()))
