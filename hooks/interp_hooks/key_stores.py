"""What some kv heads of a layer keep of the tokens they have read, and attention to that.

A store holds keys in order of their slots, `slots` beside them says which these are. Each call
brings new tokens, attends to what is held and to them, and then lets go of what its rule does not
keep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from interp_hooks.call import AttentionCall
from interp_hooks.errors import TapError
from interp_kernels import Mask, Received, Request, attention

#: query rows at a time: a store's mask has (rows, held + rows) cells
ROWS = 1024


@dataclass(frozen=True)
class Part:
    """The query and kv heads of one call that share a store.

    Attributes:
        query: (batch, heads, queries, d).
        key, value: (batch, kv_heads, queries, d), of the new tokens.
        call: the call, for its mask and settings.
        sinks: (heads,) logits, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    call: AttentionCall
    sinks: torch.Tensor | None

    def settings(self, mask: Mask) -> dict[str, Any]:
        """What attention is told."""
        call = self.call
        return dict(mask=mask, scale=call.scaling, softcap=call.softcap, sinks=self.sinks)


class Store(ABC):
    """Keys and values of some kv heads of one layer.

    Attributes:
        key, value: (batch, kv_heads, held, d); None before the first token.
    """

    key: torch.Tensor | None = None
    value: torch.Tensor | None = None

    @abstractmethod
    def attend(self, part: Part, backend: str) -> torch.Tensor:
        """z (batch, heads, queries, d) of the new tokens, which are then held by the store's
        rule."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name → what has a row a sample."""
        named = dict(key=self.key, value=self.value)
        return {name: x for name, x in named.items() if x is not None}

    def for_samples(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace all that has a row a sample by `change` of it (beams, repeats)."""
        for name, tensor in self.tensors().items():
            setattr(self, name, change(tensor))

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return sum(x.nbytes for x in (self.key, self.value) if x is not None)

    def with_new(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is held, and the new tokens after it."""
        if self.key is None or self.value is None:
            return key, value
        return torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)


class Everything(Store):
    """Keeps all keys."""

    def attend(self, part: Part, backend: str) -> torch.Tensor:
        self.key, self.value = self.with_new(part.key, part.value)
        mask = part.call.mask
        return attention(
            part.query, self.key, self.value, **part.settings(mask), backend=backend
        ).out


class Listed(Store):
    """Keeps the keys of some slots.

    Attributes:
        slots: (batch or 1, kv_heads or 1, held) int64, where each key stands, −1 where a sample has
            fewer than others; None before the first token.
    """

    slots: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        more = {} if self.slots is None or len(self.slots) == 1 else dict(slots=self.slots)
        return super().tensors() | more

    @abstractmethod
    def sees(self, slots: torch.Tensor, rows: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """bool (batch or 1, kv_heads or 1, rows, held): which of the keys at `slots`, none of them
        later, a query at `rows` (rows, 1) attends to."""

    @abstractmethod
    def let_go(self, last: int, call: AttentionCall) -> None:
        """Drop what no query after slot `last` may see."""

    def attend(self, part: Part, backend: str) -> torch.Tensor:
        check_plain(part.call)
        outs = [
            self._rows(part, start, min(start + ROWS, part.query.shape[2]), backend)
            for start in range(0, part.query.shape[2], ROWS)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _rows(self, part: Part, start: int, stop: int, backend: str) -> torch.Tensor:
        """`attend` for the query rows start:stop."""
        call, first = part.call, part.call.mask.q_start + start
        key, value = self.with_new(part.key[:, :, start:stop], part.value[:, :, start:stop])
        rows = torch.arange(first, first + stop - start, device=key.device)
        self.key, self.value, self.slots = key, value, self.followed_by(rows)
        dense = self.visible(rows, call)
        if dense is not None and dense.shape[1] > 1:  # a row a query head
            dense = dense.repeat_interleave(part.query.shape[1] // key.shape[1], 1)
        mask = Mask(False, q_start=first, dense=dense)
        if call.mask.queries is not None:
            mask = replace(mask, queries=call.mask.queries[:, start:stop])
        query = part.query[:, :, start:stop]
        out = attention(query, key, value, **part.settings(mask), backend=backend).out
        self.let_go(first + stop - start - 1, call)
        return out

    def followed_by(self, rows: torch.Tensor) -> torch.Tensor:
        """`slots`, and the new ones after them."""
        if self.slots is None:
            return rows[None, None]
        return torch.cat([self.slots, rows.expand(*self.slots.shape[:2], -1)], 2)

    def visible(self, rows: torch.Tensor, call: AttentionCall) -> torch.Tensor | None:
        """bool (batch or 1, kv_heads or 1, rows, held), None where all is seen."""
        assert self.slots is not None
        slots, at = self.slots[:, :, None], rows[:, None]  # (b, h, 1, held), (rows, 1)
        if len(rows) == 1 and call.mask.keys is None and not self.gaps:
            return None  # a step of generation sees what was kept for it
        seen = (slots >= 0) & (slots <= at) & self.sees(slots, at, call)
        if call.mask.keys is not None:
            # (batch, heads or 1, held): whether the key is one of the sample's tokens
            index = self.slots.clamp_min(0).expand(call.batch, -1, -1)
            real = call.mask.keys.bool()[:, None].expand(-1, index.shape[1], -1).gather(2, index)
            seen = seen & real[:, :, None]
        return seen

    @property
    def gaps(self) -> bool:
        """Whether some entry of `slots` stands for no key."""
        return False

    def keep(self, wanted: torch.Tensor, most: int) -> None:
        """Keep the entries that are `wanted` (batch or 1, kv_heads or 1, held) bool, `most` at
        most; where there are fewer, the places after them stand for no key."""
        index = (~wanted).to(torch.int8).argsort(stable=True, dim=-1)[..., :most]
        wanted = wanted.gather(2, index)
        self.choose(index)
        assert self.slots is not None
        self.slots = torch.where(wanted, self.slots, -1)

    def choose(self, index: torch.Tensor) -> None:
        """Keep the entries at `index` (batch or 1, kv_heads or 1, kept), in order."""
        assert self.key is not None and self.value is not None and self.slots is not None
        batch, heads = self.key.shape[:2]
        wide = index.expand(batch, heads, -1)[..., None]
        self.key = self.key.gather(2, wide.expand(-1, -1, -1, self.key.shape[3]))
        self.value = self.value.gather(2, wide.expand(-1, -1, -1, self.value.shape[3]))
        shape = torch.broadcast_shapes(index.shape[:2], self.slots.shape[:2])
        self.slots = self.slots.expand(*shape, -1).gather(2, index.expand(*shape, -1))


class Streaming(Listed):
    """Keeps the first `sink` tokens of each sample and the `recent` last ones (Xiao et al., ICLR
    2024, arXiv 2309.17453), at the slots where the text has them."""

    def __init__(self, sink: int, recent: int) -> None:
        self.sink, self.recent = sink, recent
        self._padded = False

    @property
    def gaps(self) -> bool:
        return self._padded

    def sees(self, slots: torch.Tensor, rows: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        first = _starts(call, slots)
        return (rows - slots < self.recent) | ((slots >= first) & (slots < first + self.sink))

    def let_go(self, last: int, call: AttentionCall) -> None:
        assert self.key is not None and self.value is not None and self.slots is not None
        held, kept = self.key.shape[2], self.sink + self.recent - 1
        if held <= kept:
            return
        if call.mask.starts is None and not self._padded:
            # the first ones and the last ones: no index to look up, nothing to wait for
            parts = [slice(0, self.sink), slice(held - self.recent + 1, held)]
            self.key = torch.cat([self.key[:, :, one] for one in parts], 2)
            self.value = torch.cat([self.value[:, :, one] for one in parts], 2)
            self.slots = torch.cat([self.slots[:, :, one] for one in parts], 2)
            return
        self._padded = True
        rows = torch.tensor([[last + 1]], device=self.slots.device)
        wanted = (self.slots >= 0) & self.sees(self.slots[:, :, None], rows, call)[:, :, 0]
        self.keep(wanted, kept)


class Shard(Listed):
    """Keeps the `local` last tokens, and of the earlier ones every `stride`-th block of `block`,
    for each kv head other ones (S2 attention, Lin et al. 2024, arXiv 2407.17678).

    Args:
        shards: of each kv head, the number of the first block that it keeps, below the stride.
    """

    def __init__(self, stride: int, local: int, block: int, shards: Sequence[int]) -> None:
        self.stride, self.local, self.block = stride, local, block
        self.shards = list(shards)

    @property
    def gaps(self) -> bool:
        return True

    def sees(self, slots: torch.Tensor, rows: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        block = torch.div(slots - _starts(call, slots), self.block, rounding_mode="floor")
        own = torch.tensor(self.shards, device=slots.device)[:, None, None]
        return (block % self.stride == own) | (rows - slots < self.local)

    def let_go(self, last: int, call: AttentionCall) -> None:
        assert self.key is not None and self.slots is not None
        # the most that any head keeps, known without looking at what it is
        old = max(0, last + 2 - self.local)
        blocks = -(-old // (self.stride * self.block))
        kept = blocks * self.block + self.local - 1
        if self.key.shape[2] <= kept:
            return
        rows = torch.tensor([[last + 1]], device=self.slots.device)
        wanted = (self.slots >= 0) & self.sees(self.slots[:, :, None], rows, call)[:, :, 0]
        self.keep(wanted, kept)


class Snap(Listed):
    """Keeps of a prompt the keys to which its last rows attend most, for each kv head its own, and
    all tokens after it (SnapKV, Li et al., NeurIPS 2024, arXiv 2404.14469).

    The weights of the last `window` rows, summed over them and over the query heads of a kv head,
    are averaged over `pool` neighbouring keys; the `size` − `window` largest keep their keys,
    beside the window's own. A prompt comes in one call.
    """

    def __init__(self, size: int, window: int, pool: int) -> None:
        self.size, self.window, self.pool = size, window, pool
        self._chosen = False

    def attend(self, part: Part, backend: str) -> torch.Tensor:
        if self._chosen or part.query.shape[2] == 1:
            self._chosen = True
            return super().attend(part, backend)
        # the prompt: everything is seen
        check_plain(part.call)
        call, n = part.call, part.query.shape[2]
        self.key, self.value = part.key, part.value
        self.slots = call.mask.q_start + torch.arange(n, device=part.key.device)[None, None]
        settings = part.settings(call.mask)
        out = attention(part.query, part.key, part.value, **settings, backend=backend).out
        if n > self.size:
            self._choose(part, backend)
        self._chosen = True
        return out

    def _choose(self, part: Part, backend: str) -> None:
        n, (batch, heads) = part.query.shape[2], part.key.shape[:2]
        last = part.call.part(n - self.window, n).mask
        asked = Request(lse=False, received={"window": Received(reduce="sum")})
        found = attention(
            part.query[:, :, -self.window :],
            part.key,
            part.value,
            **part.settings(last),
            request=asked,
            backend=backend,
        ).stats["received:window"]  # (batch, heads, keys)
        by_kv = found.view(batch, heads, -1, n).sum(2)[..., : n - self.window]
        pooled = torch.nn.functional.avg_pool1d(
            by_kv, self.pool, stride=1, padding=self.pool // 2, count_include_pad=True
        )
        best = pooled.topk(self.size - self.window, -1).indices.sort(-1).values
        recent = torch.arange(n - self.window, n, device=best.device).expand(batch, heads, -1)
        self.choose(torch.cat([best, recent], 2))

    def sees(self, slots: torch.Tensor, rows: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        return torch.ones_like(slots <= rows)

    def let_go(self, last: int, call: AttentionCall) -> None:
        """What is new stays."""


def _starts(call: AttentionCall, like: torch.Tensor) -> torch.Tensor:
    """(batch or 1, 1, 1, 1): the slot of each sample's first token."""
    starts = call.mask.starts
    if starts is None:
        return like.new_zeros(1, 1, 1, 1)
    return starts.to(like.device, torch.int64)[:, None, None, None]


def check_plain(call: AttentionCall) -> None:
    """Raise `TapError` for a call whose mask is more than causality and padding."""
    mask = call.mask
    if mask.dense is not None or mask.window is not None or not (mask.causal or call.is_decode):
        if call.n_queries == 1 and mask.dense is None and mask.window is None:
            return  # one query sees all keys, or there is but one
        raise TapError(
            f"A cache that drops keys needs plain causal attention, and {call.site.place} has "
            "another mask (a window of its own, images that see each other, packed texts)."
        )
