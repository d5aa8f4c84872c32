"""A cache in which each kv head holds its own share of the context."""

from __future__ import annotations

from functools import partial
from typing import Any

from interp.caches.head_cache import text_config
from interp.edits.sharded import Sharded
from interp.errors import EditError
from interp_hooks.huggingface.held_cache import HeldCache, Plan, plan_of
from interp_hooks.key_stores import Shard


class ShardCache(HeldCache):
    """A cache for `generate` that holds what the edit `Sharded` shows, and no more.

    Of n tokens a kv head holds the `local` last ones and about (n − local) / stride others
    (S2 attention, Lin et al. 2024, arXiv 2407.17678). Logits are the edit's, up to rounding.

    Args:
        model: a loaded HuggingFace model.
        edit: the layout; of a kv head's query heads it names all or none.

    Raises:
        EditError: a layout that leaves context to none, or parts the query heads of a kv head.
        TapError: a model whose layers have caches of their own kinds.

    Example:
        >>> edit = interp.edits.Sharded(stride=4, local=8, block=4)
        >>> cache = interp.caches.ShardCache(model, edit)
        >>> ids = torch.arange(20, 84)[None]
        >>> with model.edit(edit):
        ...     wanted = model.logits(ids)
        >>> found = model.logits(ids, past_key_values=cache, use_cache=True)
        >>> bool((found - wanted).abs().max() < 1e-4), cache.layers[0].stores[0][1].key.shape
        (True, torch.Size([1, 4, 23, 32]))
    """

    def __init__(self, model: Any, edit: Sharded) -> None:
        self.edit = edit
        edit.bind(model)
        plans: dict[int, Plan] = {}
        for site in model.sites:
            if not site.is_main or not edit.at(site):
                continue
            group = site.n_heads // site.n_kv_heads
            named = [h // group for h in edit.heads_at(site)]
            heads = sorted(set(named))
            if len(named) != group * len(heads):
                raise EditError(
                    f"A kv head holds the same keys for all its query heads, and sharded names "
                    f"some of them only in {site.place}."
                )
            shards = [h % edit.stride for h in heads]
            store = partial(Shard, edit.stride, edit.local, edit.block, shards)
            plans[site.layer] = plan_of(store, heads, site.n_kv_heads)
        super().__init__(text_config(model), plans)
