"""Keys that were attended to most so far, and attention to them (H2O)."""

from __future__ import annotations

import torch

from interp_hooks.call import AttentionCall
from interp_hooks.key_stores import Listed, Part, check_plain
from interp_kernels import Mask, Received, Request, attention


class HeavyHitters(Listed):
    """Keeps for each kv head the `recent` last keys and, of the earlier ones, the `size` − `recent`
    with the largest weights so far, summed over the rows that have seen them and over the query
    heads of the kv head (Zhang et al., NeurIPS 2023, arXiv 2306.14048).

    Rows of one call all see what is held when it begins, and each other; then keys go.

    Attributes:
        mass: (batch, kv_heads, held) the sum of each key's weights; None before the first token.
    """

    mass: torch.Tensor | None = None

    def __init__(self, size: int, recent: int) -> None:
        self.size, self.recent = size, recent

    def tensors(self) -> dict[str, torch.Tensor]:
        more = {} if self.mass is None else dict(mass=self.mass)
        return super().tensors() | more

    def attend(self, part: Part, backend: str) -> torch.Tensor:
        check_plain(part.call)
        call, new = part.call, part.query.shape[2]
        first = self.key is None
        key, value = self.with_new(part.key, part.value)
        rows = call.mask.q_start + torch.arange(new, device=key.device)
        self.key, self.value, self.slots = key, value, self.followed_by(rows)
        mask = call.mask
        if not first:
            dense = self.visible(rows, call)
            if dense is not None and dense.shape[1] > 1:  # a row a query head
                dense = dense.repeat_interleave(part.query.shape[1] // key.shape[1], 1)
            mask = Mask(False, q_start=call.mask.q_start, dense=dense, queries=call.mask.queries)
        found = attention(
            part.query,
            key,
            value,
            **part.settings(mask),
            request=Request(lse=False, received={"all": Received(reduce="sum")}),
            backend=backend,
        )
        batch, heads, held = *key.shape[:2], key.shape[2]
        received = found.stats["received:all"].view(batch, heads, -1, held).sum(2)
        before = received.new_zeros(batch, heads, held - new) if self.mass is None else self.mass
        self.mass = received + torch.nn.functional.pad(before, (0, held - before.shape[2]))
        self.let_go(int(rows[-1]), call)
        return found.out

    def sees(self, slots: torch.Tensor, rows: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        return torch.ones_like(slots <= rows)

    def let_go(self, last: int, call: AttentionCall) -> None:
        assert self.mass is not None
        held = self.mass.shape[2]
        if held <= self.size:
            return
        early = self.mass[..., : held - self.recent]
        heavy = early.topk(self.size - self.recent, -1).indices.sort(-1).values
        late = torch.arange(held - self.recent, held, device=heavy.device)
        index = torch.cat([heavy, late.expand(*heavy.shape[:2], -1)], 2)
        self.choose(index)
        self.mass = self.mass.gather(2, index)
