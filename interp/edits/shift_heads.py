"""Add a fixed vector to the output of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.checks import real
from interp.edits.fold import Affine
from interp.edits.head_edit import HeadEdit
from interp.errors import EditError
from interp.support.html import block
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model


@dataclass(frozen=True)
class ShiftHeads(HeadEdit):
    """Adds a vector to the output of heads: z_h ← z_h + α b_h before W_O.

    The additive edit of inference-time intervention (Li et al. 2023, arXiv 2306.03341, §3.2:
    b_h = σ_h θ_h; `interp.edits.iti_for` finds heads, θ and σ from two lists of texts) and its
    relatives. Being the same for every token, it can be baked into a checkpoint (`interp.export`).

    Args:
        directions: head → vector (d_head,), heads in any spelling; lists or tensors, through which
            gradients flow.
        strength: α, of all the heads; 0 is the identity.
        scope: "all", "prefill" or "decode".
        queries: (start, stop) tokens; None for all rows.

    Misleads:
        A vector that is long enough breaks any model, and broken answers differ too: look at what
        the model then writes, and add vectors of the same length in random directions beside it.

    Raises:
        EditError: no vectors, a head twice, a vector that is not finite; in use, one that is not as
            long as a head's output.

    Example:
        >>> edit = interp.edits.ShiftHeads({"L2H3": torch.ones(32)}, strength=0.5)
        >>> with model.edit(edit), model.capture_z() as shifted:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> with model.capture_z() as own:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> bool(torch.allclose(shifted[2][:, :, 3], own[2][:, :, 3] + 0.5))
        True
    """

    directions: InitVar[Mapping[Any, Any]]
    strength: Any = 1.0
    scope: Scope = "all"
    queries: tuple[int, int | None] | None = None
    heads: tuple[Head, ...] = field(init=False)
    #: numbers, or a tensor where gradients are asked for
    vectors: tuple[Any, ...] = field(init=False, repr=False)

    name = "shift_heads"

    def __post_init__(self, directions: Mapping[Any, Any]) -> None:  # type: ignore[override]
        if not isinstance(directions, Mapping) or not directions:
            raise EditError(
                'shift_heads takes directions, head → vector, like {"L5H1": v}, not '
                f"{quoted(directions)}."
            )
        by_head = {Head.parse(head): _vector(v, head) for head, v in directions.items()}
        if len(by_head) < len(directions):
            raise EditError(
                "directions of shift_heads have a head twice, in two spellings: "
                f"{', '.join(map(str, directions))}."
            )
        object.__setattr__(self, "heads", tuple(by_head))
        object.__setattr__(self, "vectors", tuple(by_head.values()))
        object.__setattr__(self, "strength", real(self.strength, "strength of shift_heads"))
        super().__post_init__()

    def is_identity(self) -> bool:
        return self.strength == 0 or super().is_identity()

    def shifts_at(self, site: Site) -> dict[int, torch.Tensor]:
        """Head → α b at a site."""
        here = set(self.heads_at(site))
        return {
            head.head: self.strength * _tensor(vector)
            for head, vector in zip(self.heads, self.vectors, strict=True)
            if head.layer == site.layer and head.head in here
        }

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        new = z.clone()
        for head, shift in self.shifts_at(call.site).items():
            check_width(call.site, shift.shape[0], z.shape[3])
            new[:, :, head] = z[:, :, head] + shift.to(z.dtype).to(z.device)
        rows = self.query_rows(call)
        return new if rows is None else torch.where(rows[..., None, None], new, z)

    def folded(self, model: Model) -> Mapping[Site, Affine]:
        self.check_unbounded()
        self.check_model(model)
        found = {}
        for site in (s for s in model.sites if self.at(s)):
            shifts = self.shifts_at(site)
            width = next(iter(shifts.values())).shape[0]
            offset = torch.zeros(site.n_heads, width, dtype=torch.float64)
            for head, shift in shifts.items():
                offset[head] = shift.detach().cpu().double()
            found[site] = Affine(torch.ones(site.n_heads, dtype=torch.float64), offset)
        return found

    def route(self, site: Site) -> str:
        heads = ", ".join(map(str, sorted(self.shifts_at(site))))
        return f"shift_heads {heads}: a vector added to z after the kernel"

    def fields(self) -> dict[str, Any]:
        return dict(
            directions={
                str(h): _tensor(v).tolist() for h, v in zip(self.heads, self.vectors, strict=True)
            },
            strength=self.strength,
            scope=self.scope,
            queries=None if self.queries is None else list(self.queries),
        )

    @property
    def phrase(self) -> str:
        heads = ", ".join(map(str, self.heads))
        return f"ShiftHeads {heads}; strength {self.strength:g}"

    def _repr_html_(self) -> str:
        rows = [
            [str(h), f"{float(_tensor(v).norm()):.3g}"]
            for h, v in zip(self.heads, self.vectors, strict=True)
        ]
        said = " ".join((type(self).__doc__ or "").split("\n\n")[0].split())
        facts = dict(strength=self.strength, scope=self.scope, queries=self.queries)
        return block("ShiftHeads", "", facts, ["head", "length"], rows, [said])


def check_width(site: Site, width: int, wanted: int) -> None:
    """Raise `EditError` where a vector is not as long as the heads' outputs."""
    if width != wanted:
        raise EditError(
            f"A vector of {site.place} has {width} numbers, and its heads' outputs have {wanted}."
        )


def _tensor(vector: Any) -> torch.Tensor:
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
