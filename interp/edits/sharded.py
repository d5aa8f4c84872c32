"""A part of the context for each kv head, all of it among them (S2 attention)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interp.edits.checks import count
from interp.edits.layout_edit import LayoutEdit, Listed, slots, starts
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model

#: query rows that list their keys together
ROWS = 64


@dataclass(frozen=True)
class Sharded(LayoutEdit):
    """Shows each kv head its own share of the distant context, and what is recent (S2 attention).

    Token i of a sample, i from 0, lies in block ⌊i / block⌋. A query at token t sees the tokens
    t − i < `local`, and of the others the blocks b with

        b mod stride = h mod stride        h the kv head that the query head reads

    (heterogeneous context sharding, Lin et al. 2024, arXiv 2407.17678; there models are trained so,
    some layers dense). The heads of a layer together see everything, which needs as many kv heads
    as the stride; `interp.caches.ShardCache` holds no more than this shows.

    Args:
        stride: each kv head sees a block of so many, 2 or more.
        local: recent tokens that all see, the query's own included, 1 or more.
        block: tokens of a block.
        heads: None for all; keep some layers dense by naming the others' heads.
        scope: "all", "prefill" or "decode".

    Misleads:
        A model that was not trained so loses what its heads alone know: a needle in another head's
        block is gone for a retrieval head.

    Raises:
        EditError: sizes below these; in use, fewer kv heads than the stride, so that some of the
            context is seen by none.

    Example:
        >>> edit = interp.edits.Sharded(stride=2, local=2, block=2)
        >>> with model.edit(edit), model.observe("topk", topk=8, stage="after") as seen:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> for head in (0, 2):  # of kv heads 0 and 1: what row 7 sees
        ...     keys = seen[2].topk_index[0, head, 7]
        ...     print(sorted(keys[keys >= 0].tolist()))
        [0, 1, 4, 5, 6, 7]
        [2, 3, 6, 7]
    """

    stride: int = 4
    local: int = 256
    block: int = 64
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"

    name = "sharded"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("stride", 2), ("local", 1), ("block", 1)):
            object.__setattr__(self, name, count(getattr(self, name), f"{name} of {self.name}"))
            if getattr(self, name) < least:
                raise EditError(f"{name} of sharded is {least} or more, not {getattr(self, name)}.")

    def check_model(self, model: Model) -> None:
        super().check_model(model)
        for site in model.sites:
            if self.at(site) and site.n_kv_heads < self.stride:
                raise EditError(
                    f"{site.place} has {site.n_kv_heads} kv heads, and with a stride of "
                    f"{self.stride} some of the context is seen by none of them; take a stride of "
                    f"at most {site.n_kv_heads}."
                    if site.n_kv_heads > 1
                    else f"{site.place} has one kv head, which can't share the context out."
                )

    def seen(self, call: AttentionCall) -> torch.Tensor:
        rows, keys = slots(call)
        site = call.site
        shard = torch.arange(site.n_heads, device=keys.device) * site.n_kv_heads // site.n_heads
        return in_shard(self, rows, keys, starts(call), shard)

    def listed(self, call: AttentionCall, kv_heads: torch.Tensor) -> Iterator[Listed]:
        mask, device = call.mask, call.value.device
        first = starts(call)  # (batch or 1, 1, 1, 1)
        residue = (kv_heads % self.stride)[:, None, None]  # (kv heads, 1, 1)
        turn = self.block * self.stride  # tokens of which each kv head has a block
        local = min(self.local, mask.q_start + call.n_queries + 1)  # as good, and an int32
        even = mask.starts is None and mask.keys is None and not mask.k_start
        for start in range(0, call.n_queries, ROWS):
            stop = min(start + ROWS, call.n_queries)
            near, last = mask.q_start + start + 1 - local, mask.q_start + stop
            rows = torch.arange(start, stop, device=device) + mask.q_start
            # tokens of kv head 0 that the last row does not count as recent; another's are later
            far = max(0, last - local)
            n = far // turn * self.block + min(self.block, far % turn)
            i = torch.arange(n, device=device)
            tokens = i // self.block * turn + i % self.block
            # (batch or 1, kv heads, 1, m): slots of the kv head's own blocks, then of recent tokens
            own = first + tokens + residue * self.block
            recent = torch.arange(max(near, mask.k_start), last, device=device)
            slots = torch.cat([own, recent.expand(*own.shape[:3], -1)], 3)
            # the blocks of whole turns that no row counts as recent are seen by all
            whole = max(0, near) // turn * self.block
            seen = whole if even else 0
            columns, unsure = slots - mask.k_start, slots[..., seen:]
            # (batch or 1, kv heads, 1, rows, n)
            away = rows.int()[:, None] - unsure.int()[:, :, :, None]
            is_own = torch.arange(seen, slots.shape[3], device=device) < own.shape[3]
            shown = torch.where(is_own, away >= local, away < local) & (away >= 0)
            there = (unsure >= mask.k_start) & (unsure < mask.k_start + call.n_keys)
            yield Listed(start, stop, columns, shown & there[:, :, :, None])

    def route(self, site: Site) -> str:
        return f"sharded: {self.local} recent tokens and one block of {self.stride}"


def in_shard(
    edit: Sharded,
    rows: torch.Tensor,
    keys: torch.Tensor,
    first: torch.Tensor,
    kv_heads: torch.Tensor,
) -> torch.Tensor:
    """bool (batch or 1, heads, rows, keys): the keys that heads reading `kv_heads` (heads,) see;
    rows (rows, 1) and keys slots, first (batch or 1, 1, 1, 1) the samples' first ones."""
    block = torch.div(keys - first, edit.block, rounding_mode="floor")
    own = block % edit.stride == (kv_heads % edit.stride)[:, None, None]
    return own | (rows - keys < edit.local)
