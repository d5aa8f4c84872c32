"""A cache that keeps what was attended to most."""

from __future__ import annotations

from functools import partial
from typing import Any

from interp.caches.head_cache import text_config
from interp.errors import InputError
from interp.support.checked import whole_number
from interp_hooks.heavy_hitters import HeavyHitters
from interp_hooks.huggingface.held_cache import HeldCache, plan_of


class HeavyHitterCache(HeldCache):
    """A cache for `generate` in which each kv head keeps `size` tokens; new ones push others out.

    Beside the `recent` last tokens those stay whose weights so far are largest, summed over all
    rows that saw them and over the query heads of a kv head (H2O, Zhang et al., NeurIPS 2023, arXiv
    2306.14048; there half of the tokens are recent). A prompt in one forward is attended to in
    full; then, and after each later forward, keys are let go. Layers with a sliding window keep
    that.

    Args:
        model: a loaded HuggingFace model.
        size: tokens that each kv head keeps.
        recent: how many of them are the last ones; None for half.

    Misleads:
        Early tokens are seen by more rows, and a sum favours them. What is let go is missed only
        when something later would have needed it: judge long answers, beside `SnapCache` and
        `HeadCache` at equal memory.

    Raises:
        InputError: sizes that don't go together.
        EditError, TapError: a model that can't hold keys head by head.

    Example:
        >>> cache = interp.caches.HeavyHitterCache(model, size=16)
        >>> ids = torch.arange(20, 60)[None]
        >>> out = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        >>> cache.layers[0].stores[0][1].key.shape
        torch.Size([1, 4, 16, 32])
    """

    def __init__(self, model: Any, size: int, recent: int | None = None) -> None:
        self.size = whole_number(size, "size, the tokens that are kept,")
        given = self.size // 2 if recent is None else recent
        self.recent = whole_number(given, "recent, the last tokens that are kept,")
        if not 1 <= self.recent < self.size:
            raise InputError(
                f"Of {self.size} tokens that are kept 1 or more are recent ones, and not all of "
                f"them: {self.recent}."
            )
        store = partial(HeavyHitters, self.size, self.recent)
        sites = [site for site in model.sites if site.is_main]
        plans = {s.layer: plan_of(store, range(s.n_kv_heads), s.n_kv_heads) for s in sites}
        super().__init__(text_config(model), plans)
