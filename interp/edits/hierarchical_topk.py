"""The keys that a tree search finds for each block of queries (HiP attention)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interp.edits.checks import count
from interp.edits.layout_edit import LayoutEdit, Listed, reading, slots, starts
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_kernels import tree_search
from interp_kernels.budget import ranges

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site

#: a slot before all others
LOWEST = -(1 << 30)
#: query rows that list their keys together, of those that search together
ROWS = 64


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
        On a CPU it takes longer than plain attention up to some 16,000 tokens, and where weights
        are asked for as long as a mask of everything. A step of generation searches for its one
        query, a prompt for `block_q` together, so that the two differ unless that is 1.
        Close calls of the search fall as rounding has them: other keys may be found in another
        dtype, or from one way of computing the layers before to another.

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
        if call.query is None:
            raise EditError(
                f"{self.name} needs queries and keys, and TransformerLens shows the weights; load "
                "the HuggingFace model."
            )
        shape = (*call.query.shape[:3], call.n_keys)
        # bytes, since no GPU reduces bools
        seen = torch.zeros(shape, dtype=torch.uint8, device=call.query.device)
        for start, stop, columns, shown in self.listed(
            call, torch.arange(call.site.n_kv_heads, device=seen.device)
        ):
            rows = seen[:, :, start:stop].unflatten(2, (columns.shape[2], -1))
            at = columns.clamp(0, call.n_keys - 1)[:, :, :, None]
            at = at.expand(shape[0], shape[1], -1, rows.shape[3], -1)
            rows.scatter_reduce_(4, at, shown.byte().expand(at.shape), "amax")
        # what a mask shows of later tokens (an image, a prefix) is the call's own matter
        rows, keys = slots(call)
        return seen.view(torch.bool) | (keys > rows)

    def listed(self, call: AttentionCall, kv_heads: torch.Tensor) -> Iterator[Listed]:
        query = call.query
        assert query is not None
        batch, heads, n_rows, d = query.shape
        size = max(1, min(self.block_q, n_rows))
        read = reading(kv_heads, heads)
        near = min(self.recent, call.n_keys) + min(self.sink, call.n_keys)
        listed = min(self.keep, call.n_keys) + near + min(size, ROWS)
        each = batch * heads * listed * (2 * d + 2 * min(size, ROWS))
        whole = n_rows // size
        runs = [(a * size, b * size, size) for a, b in ranges(whole, each, query.device)]
        if n_rows > whole * size:
            runs.append((whole * size, n_rows, n_rows - whole * size))
        for start, stop, rows in runs:
            if rows <= ROWS:
                found = self._found(call, (start, stop, rows), read)
                yield self._with_near(call, start, stop, found)
                continue
            for block in range(start, stop, rows):  # searched for at once, listed in parts
                found = self._found(call, (block, block + rows, rows), read)
                for a in range(block, block + rows, ROWS):
                    yield self._with_near(call, a, min(a + ROWS, block + rows), found)

    def _found(
        self, call: AttentionCall, of: tuple[int, int, int], kv_heads: torch.Tensor
    ) -> torch.Tensor:
        """(batch, heads, blocks, n): columns that the blocks of rows of (start, stop, rows a block)
        find, below 0 for none; `kv_heads` is what each head reads."""
        query, key, mask = call.query, call.key, call.mask
        assert query is not None and key is not None
        start, stop, rows = of
        # columns that the last query of each block may see
        ends = [
            max(0, min(call.n_keys, mask.q_start + last - mask.k_start))
            for last in range(start + rows, stop + 1, rows)
        ]
        own = query[:, :, start:stop].unflatten(2, (-1, rows))
        size = min(self.block_k, call.n_keys)
        count = -(-min(self.keep, call.n_keys) // size)
        low, high = tree_search(own, key, ends, count, size, mask.keys, kv_heads)
        columns = low[..., None] + torch.arange(size, device=query.device)
        return torch.where(columns < high[..., None], columns, -1).flatten(3)

    def _with_near(self, call: AttentionCall, start: int, stop: int, found: torch.Tensor) -> Listed:
        """The columns found, then the recent ones, then the first; each shown where those after it
        do not show it already."""
        device, mask, blocks = found.device, call.mask, found.shape[2]
        # (blocks, rows, 1): where the rows stand
        rows = (mask.q_start + torch.arange(start, stop, device=device)).view(blocks, -1, 1)
        there = mask.q_start + stop - mask.k_start  # columns before the last row's next
        near = min(self.recent, mask.q_start + stop + 1)  # as good, and an int32
        recent = (
            torch.arange(1 - max(1, min(near, there)), rows.shape[1], device=device) + rows[:, 0]
        )
        first = starts(call)  # (batch or 1, 1, 1, 1)
        sink = first + torch.arange(min(self.sink, mask.q_start + stop), device=device)
        batch = max(len(first), len(found))
        found = torch.where(found < 0, LOWEST, found + mask.k_start)
        parts = [found, recent, sink]
        at = torch.cat([p.expand(batch, found.shape[1], blocks, -1) for p in parts], 3)
        columns = at - mask.k_start
        away = rows.int() - at.int()[:, :, :, None]  # (batch, heads, blocks, rows, m)
        kind = torch.arange(at.shape[3], device=device)
        is_found = kind < found.shape[3]
        is_recent = ~is_found & (kind < found.shape[3] + recent.shape[1])
        of_sink = (at >= first) & (at < first + self.sink)
        shown = torch.where(is_recent, away < near, away >= near) & (away >= 0)
        inside = (columns >= 0) & (columns < call.n_keys) & ~(is_found & of_sink)
        return Listed(start, stop, columns, shown & inside[:, :, :, None])

    def route(self, site: Site) -> str:
        return f"hierarchical_topk: {self.keep} searched keys a block of queries"
