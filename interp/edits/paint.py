"""PAINT: emphasise chosen tokens before the softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.keys import KeySet, check, member
from interp.edits.values import ValueEdit
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_kernels import Request, Result, Steer

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class PAINT(ValueEdit):
    """Raises the logits of chosen keys in the last row: s_k ← s_k + α |s_k|, before the softmax.

    It acts in the last query row of a prompt and in every decode step (Arif et al. 2025, arXiv
    2501.12206: image tokens, α 0.7 for local and 0.3–0.4 for summary tokens, two edits; layers 2–31
    of 32). s are the model's own logits, scaled and soft-capped. `paint_for` makes the two edits of
    a prompt with an image.

    Args:
        keys: as in `ScaleTokens`.
        alpha: one α for all `heads`, or head → α; past 0.5 captions change abruptly.
        heads: None for all; with a mapping, its heads.
        scope: "all", "prefill" or "decode".

    Misleads:
        α has a cliff, by the paper's own numbers. Captions name fewer things under it: on
        smol-llava made-up objects fall by .07, and object F1 by .18.

    Raises:
        EditError: in use, right padding (the last row must be a token in all samples), position
            biases on the logits, or a TransformerLens model, which shows its weights only.

    Example:
        >>> def mass(*edits):
        ...     wanted = dict(pairs={"span": torch.tensor([[[2, 3, 4]]])}, stage="after")
        ...     with model.edit(*edits), model.observe("pair_mass", **wanted) as seen:
        ...         _ = model.logits(torch.arange(12)[None])
        ...     return seen[0].pair_mass["span"][0, :, -1]
        >>> bool((mass(interp.edits.PAINT((2, 5), 0.7)) > mass()).all())
        True
    """

    keys: KeySet
    alpha: Any = 0.7
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"

    name = "paint"
    value_field = "alpha"
    neutral = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keys", check(self.keys))

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        if call.query is None or call.key is None:
            raise EditError(
                "paint needs the logits, and TransformerLens shows the weights after "
                "the softmax; load the "
                "HuggingFace model."
            )
        # while generating, the rows of texts that have ended are no tokens either, and read by none
        padded = call.mask.queries is not None and not bool(call.mask.queries[:, -1].all())
        if padded and not call.is_decode:
            raise EditError(
                "paint edits the last row of each sample, which is padding here; pad on the left."
            )
        if call.mask.dense is not None and call.mask.dense.dtype != torch.bool:
            raise EditError(
                "paint is not defined here: this model adds position biases to the scores."
            )
        query = call.query[:, :, -1]  # (batch, heads, d)
        dtype = torch.promote_types(query.dtype, torch.float32)
        batch, heads, d = query.shape
        grouped = query.reshape(batch, call.key.shape[1], -1, d).to(dtype)
        s = call.scaling * (grouped @ call.key.to(dtype).transpose(-1, -2)).reshape(
            batch, heads, -1
        )
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        alpha = self.per_head(call.site, s.device).to(dtype)[:, None]  # (heads, 1)
        return Steer(bias=torch.where(member(call, self.keys)[:, None], alpha * s.abs(), 0.0))

    def rows(self, call: AttentionCall) -> tuple[int, int] | None:
        return call.n_queries - 1, call.n_queries

    def route(self, site: Site) -> str:
        return "paint: a bias on the logits of the last query row"
