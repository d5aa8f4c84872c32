"""A tree search for the keys of the largest logits, over the middle keys of ranges (HiP)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..masking import compute_dtype
from .listed_blocks import gathered


def tree_search(
    q: Tensor,
    k: Tensor,
    ends: Sequence[int],
    count: int,
    size: int,
    real: Tensor | None = None,
    kv_heads: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ranges of at most `size` keys that blocks of query rows find: their first columns, and
    those after their last, (batch, heads, blocks, count) each.

    The keys before a block's end are cut into `count` ranges. Each round halves all of them; a half
    stands for max over the block's rows of q·k, k its middle key; the best `count` of the halves go
    on, until none is of more than `size` keys. Where there are no more than count · size keys, all
    are found. Unsorted; without gradients.

    Args:
        q: queries (batch, heads, blocks, rows, d).
        k: keys (batch, kv_heads, keys, d).
        ends: how many of the first keys each block searches.
        count: ranges that go on.
        size: keys of a range that is not halved any more.
        real: (batch, keys) bool: keys that may stand for a range.
        kv_heads: (heads,) the kv head that each query head reads; default groups of equal size.

    Raises:
        ValueError: other numbers of blocks or heads, ends outside the keys, or sizes below 1.

    Example:
        >>> k = torch.tensor([0.0, 1, 2, 9, 4, 5, 6, 7]).view(1, 1, 8, 1)
        >>> low, high = tree_search(torch.ones(1, 1, 1, 1, 1), k, [8], count=2, size=1)
        >>> sorted(low.flatten().tolist())
        [3, 7]
    """
    if len(ends) != q.shape[2] or count < 1 or size < 1:
        raise ValueError(
            f"{len(ends)} ends for {q.shape[2]} blocks, {count} ranges of {size} keys: there must "
            "be an end a block, and a range and a key at least."
        )
    if any(not 0 <= end <= k.shape[2] for end in ends):
        raise ValueError(f"a block ends among the {k.shape[2]} keys, not at {list(ends)}.")
    heads = q.shape[1]
    if kv_heads is None:
        if heads % k.shape[1]:
            raise ValueError(f"{k.shape[1]} kv heads can't be shared by {heads} query heads.")
        kv_heads = torch.arange(heads, device=q.device) // (heads // k.shape[1])
    found = []
    with torch.no_grad():
        for rounds, group in groupby(enumerate(ends), lambda one: _rounds(one[1], count, size)):
            blocks = [block for block, _ in group]
            some = slice(blocks[0], blocks[-1] + 1)
            plan = (count, rounds)
            found.append(_search(q[:, :, some], k, ends[some], plan, real, kv_heads))
    if not found:
        none = torch.zeros(*q.shape[:3], count, dtype=torch.int64, device=q.device)
        return none, none
    low, high = (torch.cat(part, 2) for part in zip(*found, strict=True))
    return low, high


def _rounds(end: int, count: int, size: int) -> int:
    widest, rounds = -(-end // count), 0
    while widest > size:
        widest, rounds = -(-widest // 2), rounds + 1
    return rounds


def _search(
    q: Tensor,
    k: Tensor,
    ends: Sequence[int],
    plan: tuple[int, int],
    real: Tensor | None,
    of: Tensor,
) -> tuple[Tensor, Tensor]:
    """The search of blocks that take as many rounds; plan: (ranges, rounds)."""
    batch, heads, _, rows, d = q.shape
    (count, rounds), dtype, device = plan, compute_dtype(q, k), q.device
    queries = q.reshape(-1, rows, d).to(dtype)
    end = torch.tensor(ends, device=device)[:, None]  # (blocks, 1)
    edges = torch.arange(count + 1, device=device) * end // count
    low = edges[:, :-1].expand(batch, heads, -1, -1)
    high = edges[:, 1:].expand(batch, heads, -1, -1)
    for _ in range(rounds):
        middle = (low + high + 1) // 2
        low, high = torch.cat([low, middle], 3), torch.cat([middle, high], 3)
        # (batch, heads, blocks, 2 · count): the middle key of each half; an empty half is none
        at = torch.minimum((low + high) // 2, end - 1)
        keys = gathered(k, at, of, dtype).flatten(0, 2)
        score = torch.bmm(queries, keys.mT).amax(1).view(at.shape)
        none = low >= high
        if real is not None:
            none = none | ~real.bool().gather(1, at.flatten(1)).view(at.shape)
        best = score.masked_fill_(none, -torch.inf).topk(count, 3, sorted=False).indices
        low, high = low.gather(3, best), high.gather(3, best)
    return low, high
