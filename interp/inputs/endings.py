"""The last tokens of a prompt, run many times over, each row with the output of another head put in
its place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from interp.inputs.chunks import prefill
from interp.inputs.forward import forward
from interp_hooks.edit import Edit
from interp_hooks.heads import Head
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.model import HookedModel

#: tokens of prompts whose keys and values are held at once, over all rows
HELD = 8192


class Ending:
    """A prompt of which only the last tokens are run again: what comes before them is read once,
    and each row of a run starts from a copy of its cache. Models without a cache read all of it.

    Args:
        model: the model.
        ids: the prompt's tokens.
        last: how many of them are run again.

    Example:
        >>> from interp.inputs.endings import Ending
        >>> Ending(model, [0, 5, 6, 7, 8], last=2).logits(rows=3).shape[:2]
        torch.Size([3, 2])
    """

    def __init__(self, model: HookedModel, ids: Sequence[int], last: int):
        self.model, self.last, self.length = model, last, len(ids)
        self._ids = torch.tensor([[*ids]])  # (1, tokens)
        self._cache: Any = None
        if model.has_cache and len(ids) > last:
            with torch.no_grad():
                self._cache = prefill(model, self._ids[:, :-last]).past_key_values
            self._ids = self._ids[:, -last:]

    @torch.no_grad()
    def logits(self, rows: int, edit: Edit | None = None) -> torch.Tensor:
        """(rows, last, vocabulary) under an edit."""
        more: dict[str, Any] = {}
        if self._cache is not None:
            cache = copy.deepcopy(self._cache)  # a forward writes into it
            cache.batch_repeat_interleave(rows)
            more = dict(past_key_values=cache, use_cache=True)
        ids = self._ids.repeat(rows, 1)
        if edit is None:
            out = forward(self.model, ids, keep=self.last, **more)
        else:
            with self.model.edit(edit):
                out = forward(self.model, ids, keep=self.last, **more)
        return logits_of(out)[:, -self.last :]


class PutHeads(Edit):
    """In row b the output of head b, of a list, is another one at the last tokens.

    Args:
        heads: one a row, of the main tower.
        values: layer → (last, heads, d_head): every head's other output.
    """

    def __init__(self, heads: Sequence[Head], values: Mapping[int, torch.Tensor]):
        self.values = values
        self.by_layer: dict[int, list[tuple[int, int]]] = {}  # layer → (row, head)
        for row, head in enumerate(heads):
            self.by_layer.setdefault(head.layer, []).append((row, head.head))

    def at(self, site: Site) -> bool:
        return site.is_main and site.layer in self.by_layer

    def touches(self, call: AttentionCall) -> bool:
        return self.at(call.site)

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        new, value = z.clone(), self.values[call.site.layer].to(z)
        for row, head in self.by_layer[call.site.layer]:
            new[row, -len(value) :, head] = value[:, head]  # (last, d_head)
        return new


def main_heads(model: HookedModel) -> list[Head]:
    """The query heads of the main tower's self-attention, in order."""
    return [Head(s.layer, h, s.tower) for s in model.sites if s.is_main for h in range(s.n_heads)]


def last_outputs(model: HookedModel, ids: Sequence[int], last: int) -> dict[int, torch.Tensor]:
    """layer → (last, heads, d_head): what every head gives at a prompt's last tokens."""
    with torch.no_grad(), model.capture_z() as z:
        forward(model, torch.tensor([[*ids]]), keep=1)
    return {layer: z[layer][0, -last:] for layer in z if isinstance(layer, int)}


def put_back(
    ending: Ending,
    values: Mapping[int, torch.Tensor],
    read: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[Head, float]]:
    """Yields (head, how much `read` moves) with each head's output replaced by `values`, one head
    at a time.

    read: (rows, last, vocabulary) logits → (rows,).
    """
    plain = read(ending.logits(1))  # (1,)
    heads = main_heads(ending.model)
    rows = max(1, min(len(heads), HELD // ending.length))
    for start in range(0, len(heads), rows):
        some = heads[start : start + rows]
        moved = read(ending.logits(len(some), PutHeads(some, values))) - plain
        yield from zip(some, moved.tolist(), strict=True)
