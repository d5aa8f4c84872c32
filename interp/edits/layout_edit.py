"""Edits that hide keys from heads: sparse layouts of attention."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from interp.edits.head_edit import HeadEdit
from interp.edits.streaming import open_ended, restricted
from interp.errors import EditError

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall


class LayoutEdit(HeadEdit):
    """Restricts each head to the keys that a layout shows it: softmax over these alone.

    The layout is a mask a head, so that statistics and other edits see attention as it leaves it: a
    byte a head, query and key while a layer runs. It saves no time and no memory; it shows what a
    cache or a kernel of this layout would miss. Layers with a sliding window of their own are left
    as they are.
    """

    @abstractmethod
    def seen(self, call: AttentionCall) -> torch.Tensor:
        """bool (batch or 1, heads, queries, keys): the keys that the layout shows; causality and
        padding are the call's own matter."""

    def touches(self, call: AttentionCall) -> bool:
        return super().touches(call) and open_ended(call)

    def before(self, call: AttentionCall) -> AttentionCall:
        mask = call.mask
        if not mask.causal and mask.dense is None and call.n_queries > 1:
            raise EditError(f"{self.name} needs a causal model; in this one tokens see later ones.")
        seen = self.seen(call) | ~self.chosen(call.site, call.value.device)[:, None, None]
        dense = mask.dense
        if dense is not None:
            dense = (
                dense & seen if dense.dtype == torch.bool else dense.masked_fill(~seen, -torch.inf)
            )
        hidden = replace(mask, dense=seen if dense is None else dense)
        if call.pattern is None:
            return replace(call, mask=hidden)
        return replace(call, mask=hidden, pattern=restricted(call.pattern, seen))


def slots(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(queries, 1) and (keys,): where the rows and columns of a call stand."""
    device, mask = call.value.device, call.mask
    rows = mask.q_start + torch.arange(call.n_queries, device=device)
    return rows[:, None], mask.k_start + torch.arange(call.n_keys, device=device)


def starts(call: AttentionCall) -> torch.Tensor:
    """(batch or 1, 1, 1, 1): the slot of each sample's first real token."""
    first = call.mask.starts
    if first is None:
        return torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=call.value.device)
    return first.to(call.value.device, torch.int64)[:, None, None, None]
