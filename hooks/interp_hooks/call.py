"""One attention call of one layer, as the tap sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from interp_kernels import Mask


@dataclass(frozen=True)
class Site:
    """Where attention happens: `layer` (from 0) of `tower`, kind "self" or "cross"; `path` is the
    module's name."""

    tower: str
    layer: int
    kind: str
    path: str
    n_heads: int
    n_kv_heads: int
    d_head: int

    @property
    def is_main(self) -> bool:
        """Self-attention of the main tower: what a layer number alone means."""
        return self.tower in ("", "text") and self.kind == "self"

    def kv_head(self, head: int) -> int:
        """The key/value head that query head `head` reads."""
        return head * self.n_kv_heads // self.n_heads


@dataclass(frozen=True)
class AttentionCall:
    """What goes into softmax(q·k·scaling)·v at one site, before W_O.

    query (batch, heads, queries, d), key and value (batch, kv_heads, keys, d): un-repeated under
    GQA. `mask` says who sees whom, in absolute slots (`mask.q_start`, `mask.k_start`).
    TransformerLens gives `pattern` (batch, heads, queries, keys) instead of query and key, which
    are then None. `images` (batch, slots) bool are the image's tokens in the prompt so far, in the
    text tower of a vision-language model; None elsewhere. `hidden` (batch, queries, d_model) is the
    residual stream that enters the layer, in the main tower of HuggingFace models, where an active
    edit asks for it (`Edit.needs_hidden`).
    """

    site: Site
    query: torch.Tensor | None
    key: torch.Tensor | None
    value: torch.Tensor
    mask: Mask
    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    pattern: torch.Tensor | None = None
    images: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What `interp_kernels.attention` is told beside queries, keys and values."""
        return dict(mask=self.mask, scale=self.scaling, softcap=self.softcap, sinks=self.sinks)

    @property
    def batch(self) -> int:
        return self.value.shape[0]

    @property
    def n_keys(self) -> int:
        return self.value.shape[2] if self.pattern is None else self.pattern.shape[-1]

    @property
    def n_queries(self) -> int:
        if self.query is not None:
            return self.query.shape[2]
        assert self.pattern is not None
        return self.pattern.shape[2]

    def part(self, start: int, stop: int) -> AttentionCall:
        """The call of the query rows start:stop alone."""
        mask = self.mask
        cut = replace(
            mask,
            q_start=mask.q_start + start,
            queries=None if mask.queries is None else mask.queries[:, start:stop],
            dense=None if mask.dense is None else mask.dense[:, :, start:stop],
        )
        assert self.query is not None
        return replace(self, query=self.query[:, :, start:stop], mask=cut)

    @property
    def is_decode(self) -> bool:
        """One new query on top of a cache: a step of generation."""
        return self.n_queries == 1 and self.mask.q_start > 0
