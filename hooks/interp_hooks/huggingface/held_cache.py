"""A transformers cache whose layers keep keys head by head.

`update` hands out the new keys alone, marked; the tap then lets the layer's stores attend. Nothing
else can compute with marked keys: a model that is not tapped, or that changes its keys after the
cache, fails with a sentence instead of attending to too little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from interp_hooks.call import AttentionCall
from interp_hooks.errors import TapError
from interp_hooks.held_keys import HeldKeys
from interp_hooks.key_stores import Everything, Part, Store

#: kv heads of a layer, and what makes their store
Plan = Sequence[tuple[Sequence[int], Callable[[], Store]]]


class HeldLayer(DynamicLayer):
    """The cache of one layer: a store for each group of kv heads."""

    is_croppable = False

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self._begin()

    def _begin(self) -> None:
        self.seen, self._waiting = 0, False
        self.stores: list[tuple[list[int], Store]] = [(list(h), make()) for h, make in self.plan]

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        self.is_initialized = self._waiting = True
        self.seen += key_states.shape[2]
        return HeldKeys.wrap(key_states, self), value_states

    def attend(self, call: AttentionCall, backend: str) -> torch.Tensor:
        """z (batch, heads, queries, d) of the new tokens to what is held and to themselves."""
        assert call.query is not None and call.key is not None
        if not self._waiting:
            raise TapError(
                f"{call.site.place} attends with the keys of another layer, or twice with its own; "
                "such a model can't hold keys head by head."
            )
        self._waiting = False
        if len(self.stores) == 1:  # all heads hold alike: nothing to pick, nothing to copy
            whole = Part(call.query, call.key, call.value, call, call.sinks)
            return self.stores[0][1].attend(whole, backend)
        group = call.query.shape[1] // call.key.shape[1]
        z: torch.Tensor | None = None
        for kv_heads, store in self.stores:
            heads = [h * group + i for h in kv_heads for i in range(group)]
            sinks = None if call.sinks is None else call.sinks[heads]
            part = Part(
                call.query[:, heads],
                call.key[:, list(kv_heads)],
                call.value[:, list(kv_heads)],
                call,
                sinks,
            )
            out = store.attend(part, backend)
            if z is None:
                z = out.new_empty(call.batch, call.query.shape[1], *out.shape[2:])
            z[:, heads] = out
        assert z is not None
        return z

    @property
    def nbytes(self) -> int:
        """Of the keys and values that are held."""
        return sum(store.nbytes for _, store in self.stores)

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        self._begin()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise TapError(
                "Tokens can't be taken back from a cache that has let go of keys; generate "
                "without drafts (assistant_model=, prompt_lookup_num_tokens=)."
            )

    def _for_samples(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for _, store in self.stores:
            store.for_samples(change)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._for_samples(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._for_samples(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._for_samples(lambda x: x[indices.to(x.device)])


class HeldCache(DynamicCache):
    """A cache for `generate` whose layers hold keys head by head.

    Args:
        config: of the language model.
        plans: number of a layer → its kv heads and what makes their stores; layers that are not
            named keep everything, and those with a sliding window keep that.

    Raises:
        TapError: a layer whose cache is of a kind of its own.
    """

    held = True

    def __init__(self, config: Any, plans: Mapping[int, Plan]) -> None:
        super().__init__(config=config)
        for layer, plan in plans.items():
            own = self.layers[layer] if layer < len(self.layers) else None
            if type(own) is DynamicSlidingWindowLayer:
                continue
            if type(own) is not DynamicLayer:
                raise TapError(
                    f"Layer {layer} of this model has a cache of its own kind "
                    f"({type(own).__name__}), which can't be held head by head."
                )
            self.layers[layer] = HeldLayer(plan)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are held, in all layers."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, HeldLayer):
                total += layer.nbytes
                continue
            own = (getattr(layer, "keys", None), getattr(layer, "values", None))
            total += sum(x.nbytes for x in own if isinstance(x, torch.Tensor))
        return total


def plan_of(store: Callable[[], Store], heads: Sequence[int], n_kv_heads: int) -> Plan:
    """The plan of a layer in which these kv heads have such a store and the others keep
    everything."""
    rest = [h for h in range(n_kv_heads) if h not in set(heads)]
    return [(part, make) for part, make in ((rest, Everything), (list(heads), store)) if part]
