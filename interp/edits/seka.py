"""Move keys of chosen tokens along learned directions, before they are rotated (SEKA)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.head_edit import HeadEdit
from interp.edits.keys import KeySet, check, member
from interp.edits.values import Number, fixed, number
from interp.errors import EditError, HeadError, TapError
from interp.support.html import block
from interp_hooks.edit import BoundEdit, CallEdit, Scope
from interp_hooks.heads import no_attention
from interp_hooks.huggingface.rotations import Rotations, rotations
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model


@dataclass(frozen=True)
class SEKA(HeadEdit):
    """Moves the keys of chosen tokens in chosen KV heads: k ← k + g M k, before rotation.

    The spectral editing of key embeddings of Li et al. 2026 (arXiv 2603.01281), with M the
    projectors that `interp.edits.seka_for` finds, M = P⁺ + r P⁻. The key is the one after its norm,
    where there is one. The call has it rotated, R k, and R is linear: with T_p = R_p R_0⁻¹, which
    is measured in the model, R k + g T M Tᵀ R k is what the projection would have given. What the
    cache holds stays as it is, so the edit ends with its block.

    Args:
        keys: "initial", a span (start, stop) or a list of positions counted from each sample's
            first real token, a text of the prompt, Span("the instruction"), or a (batch, slots)
            bool tensor.
        heads: KV heads, in any spelling: a key belongs to all query heads that read it.
        matrices: (KV heads, d_head, d_head), M of each.
        gain: g; 0 is the identity, −1 with a projector takes the directions out.
        scope: "all", "prefill" or "decode".

    Misleads:
        k + g k with no direction at all also moves attention, by (1 + g) on the logits: what M adds
        is told by random projectors of the same rank in the same heads, and what the keys add by
        another span.

    Raises:
        EditError: matrices that are not one a head, square and finite; in use, a model that shows
            no keys (TransformerLens), positions that are not known or don't rise by one.
        HeadError: a KV head that does not exist.

    Example:
        >>> edit = interp.edits.SEKA((2, 5), ["L2H1"], torch.eye(32)[None], gain=0.5)
        >>> ids, calls = torch.arange(8)[None], []
        >>> with model.activations("k") as own:
        ...     _ = model.logits(ids)
        >>> with model.edit(edit), model.activations("k") as moved:
        ...     _ = model.logits(ids)
        >>> (moved["k", 2] / own["k", 2])[0, :, 1, 0].round(decimals=3).tolist()
        [1.0, 1.0, 1.5, 1.5, 1.5, 1.0, 1.0, 1.0]
    """

    keys: KeySet
    heads: Any
    matrices: Any
    gain: Number = 1.0
    scope: Scope = "all"

    name = "seka"

    def __post_init__(self) -> None:
        if self.heads is None:
            raise EditError("seka names its KV heads, one a matrix.")
        super().__post_init__()
        object.__setattr__(self, "keys", check(self.keys))
        object.__setattr__(self, "gain", number(self.gain, "The gain of seka"))
        given = _matrices(self.matrices)
        object.__setattr__(self, "matrices", given)
        if len(given) != len(self.heads) or len(set(self.heads)) < len(self.heads):
            raise EditError(
                f"seka has a matrix for each of its KV heads, each named once, and here are "
                f"{len(given)} for {len(self.heads)}."
            )

    def is_identity(self) -> bool:
        return fixed(self.gain, 0) or super().is_identity()

    def at(self, site: Site) -> bool:
        return site.is_main and any(h.layer == site.layer for h in self.heads)

    def heads_at(self, site: Site) -> list[int]:
        """The query heads that read the KV heads concerned."""
        own = {h.head for h in self.heads if self.at(site) and h.layer == site.layer}
        return [h for h in range(site.n_heads) if site.kv_head(h) in own]

    def check_model(self, model: Model) -> None:
        sizes = {s.layer: s for s in model.sites if s.is_main}
        for head in self.heads:
            site = sizes.get(head.layer)
            if site is None:
                raise HeadError(
                    f"{model.name} has no KV head {head}: {no_attention(head.layer, sizes)}."
                )
            if head.head >= site.n_kv_heads or head.tower not in ("", site.tower):
                raise HeadError(
                    f"{model.name} has no KV head {head}: layer {head.layer} has "
                    f"{site.n_kv_heads} KV heads."
                )
            if self.matrices.shape[1] != site.d_head:
                raise EditError(
                    f"The matrices of seka are for keys of {self.matrices.shape[1]} numbers, and "
                    f"those of {model.name} have {site.d_head} in {site.place}."
                )

    def bind(self, model: Model) -> CallEdit:
        self.check_model(model)
        try:
            return BoundSEKA(self.reading(model), rotations(model))
        except TapError as error:
            raise EditError(f"seka can't be used here: {error}") from error

    def before(self, call: AttentionCall) -> AttentionCall:
        """The call with the keys moved as they stand: of a model that turns none."""
        return self.moved(call, None)

    def moved(self, call: AttentionCall, turns: Rotations | None) -> AttentionCall:
        """The call with the keys moved, by how the model turns them."""
        if call.key is None:
            raise EditError(
                "seka moves keys, and TransformerLens shows the weights; load the HuggingFace "
                "model."
            )
        marked = member(call, self.keys).to(call.key.device)  # (batch or 1, keys)
        columns = marked.any(0).nonzero().flatten()
        if not len(columns):
            return call
        own = call.key[:, :, columns]  # (batch, kv_heads, m, d)
        turn = None if turns is None else _turn(call, turns, columns)  # (batch or 1, m, d, d)
        which = [i for i, h in enumerate(self.heads) if h.layer == call.site.layer]
        heads = [self.heads[i].head for i in which]
        wide = torch.promote_types(own.dtype, torch.float32)
        matrices = self.matrices[which].to(own.device, wide)  # (n, d, d)
        k = own[:, heads].to(wide)  # (batch, n, m, d)
        if turn is not None:
            turn = turn.to(own.device, wide)
            k = torch.einsum("bmij,bnmi->bnmj", turn.expand(len(k), -1, -1, -1), k)  # Tᵀ k
        step = torch.einsum("nij,bnmj->bnmi", matrices, k)  # M Tᵀ k
        if turn is not None:
            step = torch.einsum("bmij,bnmj->bnmi", turn.expand(len(k), -1, -1, -1), step)
        gain = self.gain.to(step) if isinstance(self.gain, torch.Tensor) else self.gain
        new = own.clone()
        new[:, heads] = (own[:, heads].to(wide) + gain * step).to(own.dtype)
        new = torch.where(marked[:, columns][:, None, :, None], new, own)
        return replace(call, key=call.key.index_copy(2, columns, new))

    @property
    def phrase(self) -> str:
        heads = ", ".join(map(str, self.heads[:4])) + (", …" if len(self.heads) > 4 else "")
        return f"SEKA KV {heads}; keys {self.keys}; gain {float(self.gain):g}"

    def _repr_html_(self) -> str:
        facts = dict(keys=str(self.keys), gain=float(self.gain), scope=self.scope)
        ranks = torch.linalg.matrix_rank(self.matrices.detach().double().cpu())
        rows = [[str(h), int(r)] for h, r in zip(self.heads, ranks, strict=True)]
        said = " ".join((type(self).__doc__ or "").split("\n\n")[0].split())
        return block("SEKA", "", facts, ["KV head", "rank"], rows, [said])

    def route(self, site: Site) -> str:
        return f"seka × {float(self.gain):g}: keys moved before the kernel"


class BoundSEKA(BoundEdit[SEKA]):
    """The edit in one model, with how it turns keys."""

    def __init__(self, edit: SEKA, turns: Rotations):
        super().__init__(edit)
        self.turns = turns

    def before(self, call: AttentionCall) -> AttentionCall:
        try:
            return self.edit.moved(call, self.turns)
        except TapError as error:
            raise EditError(f"seka can't be used here: {error}") from error


def _turn(call: AttentionCall, turns: Rotations, columns: torch.Tensor) -> torch.Tensor | None:
    """(batch or 1, m, d, d): T at the positions of key columns; None where nothing is turned."""
    if turns.at(call.site.layer, columns[:0]) is None:
        return None
    if turns.several_axes and call.images is not None and bool(call.images.any()):
        raise EditError(
            "seka needs each key's position, and tokens of pictures have several here; use it on "
            "text alone."
        )
    positions = key_positions(call)[:, columns.cpu()]  # (batch or 1, m)
    different, back = positions.unique(return_inverse=True)
    turn = turns.at(call.site.layer, different)
    return None if turn is None else turn[back]


def key_positions(call: AttentionCall) -> torch.Tensor:
    """(batch or 1, keys) int64 on the CPU: the position ids of the keys, which rise by one from key
    to key; 0 in padding.

    Raises `EditError` where the model does not tell those of its queries, or they don't rise so.
    """
    given, mask = call.positions, call.mask
    if given is None:
        raise EditError(
            f"seka needs the position ids of the tokens, which {call.site.place} of this model is "
            "not given."
        )
    slots = torch.arange(call.n_queries) + mask.q_start
    shift = given.cpu() - slots  # (batch or 1, queries)
    real = torch.ones_like(shift, dtype=torch.bool)
    if mask.queries is not None:
        real = mask.queries.cpu().expand(max(len(shift), len(mask.queries)), -1)
        shift = shift.expand_as(real)
    # padding may stand on either side: of the last row that is real
    order = torch.arange(1, call.n_queries + 1)
    last = shift.gather(1, (real * order).argmax(1, keepdim=True))
    if not bool(((shift == last) | ~real).all()):
        raise EditError(
            "seka needs position ids that rise by one from token to token, and those of this "
            "forward don't."
        )
    keys = torch.arange(call.n_keys) + mask.k_start
    return (keys + last).clamp_min(0)


def _matrices(value: Any) -> torch.Tensor:
    """(n, d, d): the matrices. Raises `EditError`."""
    said = "The matrices of seka are (KV heads, d_head, d_head) finite numbers, not "
    if not isinstance(value, torch.Tensor):
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise EditError(f"{said}{quoted(value)}.")
        try:
            value = torch.as_tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise EditError(f"{said}{quoted(value)}.") from None
    if value.ndim != 3 or value.shape[1] != value.shape[2] or not value.is_floating_point():
        raise EditError(f"{said}{tuple(value.shape)}.")
    if not bool(torch.isfinite(value).all()):
        raise EditError(f"{said}some that are not finite.")
    return value
