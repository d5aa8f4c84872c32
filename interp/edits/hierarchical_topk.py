"""The keys that a tree search finds for each block of queries (HiP attention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interp.edits.checks import count
from interp.edits.layout_edit import LayoutEdit, slots, starts
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class HierarchicalTopk(LayoutEdit):
    """Shows each block of queries the keys that a tree search finds, the first and the recent ones.

    The keys before a block of queries are cut into k = ⌈keep / block_k⌉ ranges. Each round halves
    every range; a half stands for the score of its middle key, max over the block's queries of q·k;
    the k best of the 2k halves go on, until ranges are of `block_k` keys (HiP, Lee et al., ICLR
    2025, arXiv 2406.09827). It looks at about 2k·log₂(n / keep) keys instead of n, and errs where a
    range's middle says nothing of its best key. The paper keeps 512 keys; there, too, first and
    recent tokens are seen always.

    Args:
        keep: keys that are searched for.
        block_q: queries that search together.
        block_k: keys that are found together.
        sink: first tokens of each sample that are seen always.
        recent: last tokens that are seen always, the query's own included.
        heads: None for all.
        scope: "all", "prefill" or "decode".

    Misleads:
        It computes all of attention and hides what the search would not have found: no time is
        saved. A step of generation searches for its one query, a prompt for `block_q` together, so
        that the two differ unless that is 1.

    Raises:
        EditError: sizes below 1 (`sink` below 0); in use, a TransformerLens model, which shows no
            queries and keys.

    Example:
        >>> edit = interp.edits.HierarchicalTopk(keep=4, block_q=1, block_k=1, sink=0, recent=1)
        >>> with model.edit(edit), model.observe("topk", topk=16, stage="after") as seen:
        ...     _ = model.logits(torch.arange(16)[None])
        >>> (seen[2].topk_index[0, 0, 15] >= 0).sum().item() <= 5
        True
    """

    keep: int = 512
    block_q: int = 32
    block_k: int = 2
    sink: int = 4
    recent: int = 64
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"

    name = "hierarchical_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keep", "block_q", "block_k", "sink", "recent"):
            object.__setattr__(self, name, count(getattr(self, name), f"{name} of {self.name}"))
            if getattr(self, name) < (name != "sink"):
                raise EditError(f"{name} of {self.name} is too small: {getattr(self, name)}.")

    def seen(self, call: AttentionCall) -> torch.Tensor:
        if call.query is None or call.key is None:
            raise EditError(
                f"{self.name} needs queries and keys, and TransformerLens shows the weights; load "
                "the HuggingFace model."
            )
        rows, keys = slots(call)
        near = (rows - keys < self.recent) | (
            (keys >= starts(call)) & (keys < starts(call) + self.sink)
        )
        parts = []
        for start in range(0, call.n_queries, self.block_q):
            stop = min(start + self.block_q, call.n_queries)
            found = self._search(call, start, stop)  # (batch, heads, keys)
            parts.append(found[:, :, None] | near[..., start:stop, :])
        return torch.cat(parts, 2)

    @torch.no_grad()
    def _search(self, call: AttentionCall, start: int, stop: int) -> torch.Tensor:
        """bool (batch, heads, keys): what the queries start:stop find among the keys before the
        last of them."""
        assert call.query is not None and call.key is not None
        query, mask = call.query[:, :, start:stop].float(), call.mask
        batch, heads = query.shape[:2]
        # columns that the last of these queries may see
        n = min(call.n_keys, mask.q_start + stop - mask.k_start)
        # with a column after the last key, for places that hold none
        found = torch.zeros(batch, heads, call.n_keys + 1, dtype=torch.bool, device=query.device)
        k = -(-self.keep // self.block_k)
        if n <= k * self.block_k:
            found[..., :n] = True
            return found[..., :-1]
        group = heads // call.key.shape[1]
        edges = torch.arange(k + 1, device=query.device) * n // k
        low = edges[:-1].expand(batch, heads, -1)
        high = edges[1:].expand(batch, heads, -1)
        size = -(-n // k)  # of the largest range: as many rounds in all heads
        while size > self.block_k:
            size = -(-size // 2)
            middle = (low + high + 1) // 2
            low, high = torch.cat([low, middle], 2), torch.cat([middle, high], 2)
            # (batch, heads, 2k): the middle key of each half; an empty half is none
            at = ((low + high) // 2).clamp_max(n - 1)
            own = at.view(batch, -1, group * at.shape[2])
            wide = own[..., None].expand(-1, -1, -1, call.key.shape[3])
            key = call.key.float().gather(2, wide).view(batch, heads, at.shape[2], -1)
            score = torch.einsum("bhqd,bhkd->bhqk", query, key).amax(2)
            if mask.keys is not None:
                real = mask.keys.bool()[:, None].expand(-1, heads, -1).gather(2, at)
                score = score.masked_fill(~real, -torch.inf)
            score = score.masked_fill(low >= high, -torch.inf)
            best = score.topk(k, 2).indices
            low, high = low.gather(2, best), high.gather(2, best)
        for offset in range(self.block_k):
            found.scatter_(2, torch.where(low + offset < high, low + offset, call.n_keys), True)
        return found[..., :-1]

    def route(self, site: Site) -> str:
        return f"hierarchical_topk: a mask of {self.keep} searched keys a block of queries"
