"""Edits that hide keys from heads: sparse layouts of attention."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from interp.edits.head_edit import HeadEdit
from interp.edits.streaming import open_ended, restricted
from interp.errors import EditError
from interp_kernels import Request, attend_listed, attention

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall


class Listed(NamedTuple):
    """Of the query rows start:stop, in blocks of equal size, the key columns of each block (batch
    or 1, heads or kv heads, blocks, m), and which of the last n ≤ m its rows see, bool that
    broadcasts to (batch, the same heads, blocks, rows, n); they see all before these."""

    start: int
    stop: int
    columns: torch.Tensor
    shown: torch.Tensor


class LayoutEdit(HeadEdit):
    """Restricts each head to the keys that a layout shows it: softmax over these alone.

    Where nobody asks for weights and it is the only edit, blocks of queries gather the keys that
    they see, and the others are never read. Else the layout is a mask a head, so that statistics
    and other edits see attention as it leaves it: a byte a head, query and key while a layer runs,
    and the time of all of attention. Layers with a sliding window of their own are left as they
    are.
    """

    @abstractmethod
    def seen(self, call: AttentionCall) -> torch.Tensor:
        """bool (batch or 1, heads, queries, keys): the keys that the layout shows; causality and
        padding are the call's own matter."""

    @abstractmethod
    def listed(self, call: AttentionCall, kv_heads: torch.Tensor) -> Iterator[Listed]:
        """The keys of all query rows, block by block; `kv_heads` says which of the site's kv heads
        the call's own are. Causality is part of what is shown; padding is not, and where there is
        some, every column has a say in `shown`."""

    def alone(self, call: AttentionCall) -> torch.Tensor | None:
        if not self._plain(call):
            return None
        assert call.query is not None and call.key is not None
        # lists are gathered from rows that lie side by side: a model's strided ones are copied once
        call = replace(call, key=call.key.contiguous(), value=call.value.contiguous())
        assert call.query is not None and call.key is not None
        site, device = call.site, call.value.device
        heads = self.heads_at(site)
        if len(heads) == site.n_heads:
            return self._of_lists(call, torch.arange(site.n_kv_heads, device=device))
        # the others attend to everything; those chosen stand by themselves
        request = Request(lse=False)
        z = attention(call.query, call.key, call.value, **call.settings, request=request).out
        at = torch.tensor(heads, device=device)
        kv_heads = at // (site.n_heads // site.n_kv_heads)
        part = replace(
            call,
            query=call.query[:, at],
            key=call.key[:, kv_heads],
            value=call.value[:, kv_heads],
            sinks=None if call.sinks is None else call.sinks[at],
        )
        z[:, heads] = self._of_lists(part, kv_heads)
        return z

    def _of_lists(self, call: AttentionCall, kv_heads: torch.Tensor) -> torch.Tensor:
        """z (batch, heads, queries, d) of a call, whose kv heads are these of the site."""
        query, key, value, real = call.query, call.key, call.value, call.mask.keys
        assert query is not None and key is not None
        settings: dict[str, Any] = dict(scale=call.scaling, softcap=call.softcap, sinks=call.sinks)
        z = value.new_empty(*query.shape[:3], value.shape[3])
        for start, stop, columns, shown in self.listed(call, kv_heads):
            if real is not None:
                shown = shown & _real(real, columns[..., -shown.shape[-1] :])
            rows = query[:, :, start:stop]
            z[:, :, start:stop] = attend_listed(rows, key, value, columns, shown, **settings)
        return z

    def _plain(self, call: AttentionCall) -> bool:
        """Whether the keys may be listed: plain causal attention of which no gradient is wanted."""
        mask, tensors = call.mask, (call.query, call.key, call.value)
        if call.query is None or not mask.causal or mask.dense is not None or mask.window:
            return False
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return not wanted

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


def _real(keys: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(batch, heads, blocks, 1, m) bool: which columns hold a token; keys (batch, keys) bool."""
    batch = len(keys)
    at = columns.expand(batch, -1, -1, -1).clamp(0, keys.shape[1] - 1)
    return keys.bool().gather(1, at.flatten(1)).view(at.shape)[:, :, :, None]


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
