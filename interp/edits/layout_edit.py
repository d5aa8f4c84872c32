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
from interp_kernels import KeyLists, Request, attend_listed, attention

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall


#: keys up to which a mask of all of them is as quick as lists
SHORT = 1024


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

    Where it is the only edit, nobody asks for weights, no gradient is wanted and there are more
    than 1,024 keys, blocks of queries gather those that they see, and no mask of all is made (heads
    that it does not name attend as ever). Else the layout is a mask a head, so that statistics and
    other edits see attention as it leaves it: a byte a head, query and key while a layer runs, and
    the time of all of attention. Layers with a sliding window of their own are left as they are.
    """

    @abstractmethod
    def seen(self, call: AttentionCall) -> torch.Tensor:
        """bool (batch or 1, heads, queries, keys): the keys that the layout shows; causality and
        padding are the call's own matter."""

    def listed(self, call: AttentionCall, kv_heads: torch.Tensor) -> Iterator[Listed] | None:
        """The keys of all query rows, block by block, where a layout has lists; `kv_heads` says
        which of the call's kv heads its query heads read, for each of them or, in equal groups, for
        each kv head. Causality is part of what is shown; padding is not, and where there is some,
        every column has a say in `shown`."""
        return None

    def alone(self, call: AttentionCall) -> torch.Tensor | None:
        if not self._plain(call) or not self._lists_are_seen():
            return None
        assert call.query is not None and call.key is not None
        site, device = call.site, call.value.device
        heads = self.heads_at(site)
        if len(heads) == site.n_heads:
            return self._of_lists(call, torch.arange(site.n_kv_heads, device=device))
        # the others attend to everything; those chosen stand by themselves
        request = Request(lse=False)
        z = attention(call.query, call.key, call.value, **call.settings, request=request).out
        at = torch.tensor(heads, device=device)
        sinks = None if call.sinks is None else call.sinks[at]
        part = replace(call, query=call.query[:, at], sinks=sinks)
        chosen = self._of_lists(part, at // (site.n_heads // site.n_kv_heads))
        return None if chosen is None else z.index_copy_(1, at, chosen)

    def _of_lists(self, call: AttentionCall, kv_heads: torch.Tensor) -> torch.Tensor | None:
        """z (batch, heads, queries, d) of a call, whose query heads read these kv heads."""
        query, key, value, real = call.query, call.key, call.value, call.mask.keys
        assert query is not None and key is not None
        parts = self.listed(call, kv_heads)
        if parts is None:
            return None
        settings: dict[str, Any] = dict(scale=call.scaling, softcap=call.softcap, sinks=call.sinks)
        z = value.new_empty(*query.shape[:3], value.shape[3])
        for start, stop, columns, shown in parts:
            if real is not None:
                shown = shown & _real(real, columns[..., -shown.shape[-1] :])
            lists = KeyLists(columns, shown, reading(kv_heads, columns.shape[1]))
            rows = query[:, :, start:stop]
            z[:, :, start:stop] = attend_listed(rows, key, value, lists, **settings)
        return z

    def _lists_are_seen(self) -> bool:
        """Whether `listed` says what the mask does: not where a subclass changed the mask alone."""
        ways = {"before", "seen", "listed", "steer", "attend"}
        last = next(kind for kind in type(self).__mro__ if ways & vars(kind).keys())
        return "listed" in vars(last)

    def _plain(self, call: AttentionCall) -> bool:
        """Whether keys are listed: many, in causal attention of which no gradient is wanted."""
        mask, tensors = call.mask, (call.query, call.key, call.value)
        if call.query is None or call.n_keys <= SHORT:
            return False
        if not mask.causal or mask.dense is not None or mask.window:
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


def reading(kv_heads: torch.Tensor, heads: int) -> torch.Tensor:
    """(heads,): the kv head that each of so many heads reads, where equal groups share these."""
    return kv_heads.repeat_interleave(heads // len(kv_heads))


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
