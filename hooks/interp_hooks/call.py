"""One attention call of one layer, as the tap sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from interp_kernels import Mask

if TYPE_CHECKING:
    from interp_hooks.forward_notes import ForwardNotes
    from interp_hooks.head_shards import HeadShards

#: the tower of streams that a module attends with beside its main one
STREAMS = "ngram"


@dataclass(frozen=True)
class Site:
    """Where attention happens: `layer` (from 0) of `tower`, kind "self" or "cross".

    Attributes:
        tower, layer, kind: the place.
        path: the module's name.
        n_heads, n_kv_heads, d_head: its size.
        output_gate: whether each head's output is multiplied by a gate before W_O reads it.
        learned_sinks: whether the softmax has a logit of its own per head, which no key holds.

    Example:
        >>> site = model.sites[2]
        >>> site.layer, site.kind, site.n_heads, site.n_kv_heads
        (2, 'self', 8, 4)
    """

    tower: str
    layer: int
    kind: str
    path: str
    n_heads: int
    n_kv_heads: int
    d_head: int
    output_gate: bool = False
    learned_sinks: bool = False

    @property
    def place(self) -> str:
        """In a sentence: "layer 3", "vision layer 3"."""
        return f"{self.tower} layer {self.layer}" if self.tower else f"layer {self.layer}"

    @property
    def is_main(self) -> bool:
        """Self-attention of the main tower: what a layer number alone means."""
        return self.tower in ("", "text") and self.kind == "self"

    @property
    def is_stream(self) -> bool:
        """Whether it attends for streams beside the main one, (batch · streams) rows that see keys
        of their own after those of the text (ProphetNet's n-grams)."""
        return self.tower == STREAMS

    def kv_head(self, head: int) -> int:
        """The key/value head that query head `head` reads."""
        return head * self.n_kv_heads // self.n_heads


class Holder(Protocol):
    """A layer of a cache that attends with the keys that it holds."""

    seen: int

    def attend(self, call: AttentionCall, backend: str) -> torch.Tensor:
        """z (batch, heads, queries, d) of the call's new tokens."""
        ...


@dataclass(frozen=True)
class AttentionCall:
    """What goes into softmax(q·k·scaling)·v at one site, before W_O.

    Attributes:
        site: where it happens.
        query: (batch, heads, queries, d); None in TransformerLens models, as is `key`.
        key, value: (batch, kv_heads, keys, d), un-repeated under GQA.
        mask: who sees whom, in absolute slots (`mask.q_start`, `mask.k_start`).
        scaling, softcap, sinks: of the logits; the last two None where the model has none.
        pattern: (batch, heads, queries, keys) in place of query and key in TransformerLens models.
        images: (batch, slots) bool, the image's tokens in the prompt so far, in the text tower of a
            vision-language model; None elsewhere.
        hidden: (batch, queries, d_model), the residual stream that enters the layer, in the main
            tower of HuggingFace models, where an active edit asks for it (`Edit.needs_hidden`).
        tokens: (batch, slots) int64, the ids of the prompt so far, −1 in padding, in the main
            tower, where an active edit asks for them (`Edit.needs_tokens`) and they are known;
            None elsewhere.
        weights: takes the attention weights (batch, heads, queries, keys) after edits, where the
            model's caller asks for them (`output_attentions=True`); None elsewhere.
        positions: (batch or 1, queries) int64, the position ids of the new tokens, where the model
            hands them to its attention; None elsewhere.
        copies: rows of the batch for each sample of the prompt (beams, `num_return_sequences`).
        notes: what the layers of its forward share; None where forwards aren't followed.
        holder: the cache's layer, where it holds the keys before those of this call (`key` and
            `value` are then the new tokens' alone); None with other caches.
        shards: the processes that share its heads out (tensor parallelism), where its tensors are
            of this process's heads alone; None where they are of all, as observers and edits get
            it. `site` counts all heads either way.

    Example:
        >>> from interp_hooks import Question
        >>> calls = []
        >>> with model.watch(Question(call=True), lambda stats: calls.append(stats.call)):
        ...     _ = model.logits(torch.arange(8)[None])
        >>> calls[2].site.layer, calls[2].query.shape, calls[2].key.shape
        (2, torch.Size([1, 8, 8, 32]), torch.Size([1, 4, 8, 32]))
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
    tokens: torch.Tensor | None = None
    weights: Callable[[torch.Tensor], object] | None = None
    positions: torch.Tensor | None = None
    copies: int = 1
    notes: ForwardNotes | None = None
    holder: Holder | None = None
    shards: HeadShards | None = None

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

    def rows_of(self, values: torch.Tensor) -> torch.Tensor | None:
        """(batch or 1, …): what is given for each sample of the prompt, for the rows of the batch;
        under beams and `num_return_sequences` a sample's own is repeated. None where there is
        neither a value for all, nor one for each sample."""
        samples = len(values)
        if samples in (1, self.batch):
            return values
        if samples * self.copies == self.batch:
            return values.repeat_interleave(self.copies, 0)
        return None

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
        places = None if self.positions is None else self.positions[:, start:stop]
        return replace(self, query=self.query[:, :, start:stop], mask=cut, positions=places)

    def whole(self) -> AttentionCall:
        """The call of all heads, gathered from the processes that share them out; every one must
        ask. The call itself where it is whole."""
        shards = self.shards
        if shards is None:
            return self
        assert self.query is not None and self.key is not None
        heads, mask, sinks = self.query.shape[1], self.mask, self.sinks
        if mask.dense is not None and 1 < mask.dense.shape[1] == heads:
            mask = replace(mask, dense=shards.whole(mask.dense, 1))
        if sinks is not None and len(sinks) == heads:
            sinks = shards.whole(sinks, 0)
        query, key, value = (shards.whole(t, 1) for t in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, mask=mask, sinks=sinks, shards=None)

    @property
    def is_decode(self) -> bool:
        """One new query on top of a cache: a step of generation."""
        return self.n_queries == 1 and self.mask.q_start > 0
