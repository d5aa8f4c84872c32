"""A cache that keeps of a prompt what its last rows attend to."""

from __future__ import annotations

from functools import partial
from typing import Any

from interp.caches.head_cache import text_config
from interp.errors import InputError
from interp.support.checked import whole_number
from interp_hooks.huggingface.held_cache import HeldCache, plan_of
from interp_hooks.key_stores import Snap


class SnapCache(HeldCache):
    """A cache for `generate` in which each kv head keeps `size` tokens of a prompt, then all.

    The weights A of the last `window` prompt rows, summed over them and over the query heads of a
    kv head, are averaged over `pool` neighbouring keys; the ``size − window`` largest stay, beside
    the window itself (SnapKV, Li et al., NeurIPS 2024, arXiv 2404.14469; there window 64, pool 5).
    The prompt must come in one forward, and is attended to in full; what is let go is missed by the
    tokens after it only. Layers with a sliding window keep that.

    Args:
        model: a loaded HuggingFace model.
        size: tokens of the prompt that each kv head keeps, more than `window`.
        window: the last rows, which choose.
        pool: keys that are averaged, an odd number.

    Raises:
        InputError: sizes that don't go together.
        EditError, TapError: a model that can't hold keys head by head.

    Example:
        >>> cache = interp.caches.SnapCache(model, size=16, window=4)
        >>> ids = torch.arange(20, 60)[None]
        >>> out = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        >>> cache.layers[0].stores[0][1].key.shape  # 16 of the prompt and 7 after it
        torch.Size([1, 4, 23, 32])
    """

    def __init__(self, model: Any, size: int, window: int = 64, pool: int = 5) -> None:
        self.size = whole_number(size, "size, the tokens that are kept,")
        self.window = whole_number(window, "window, the rows that choose,")
        self.pool = whole_number(pool, "pool, the keys that are averaged,")
        if not 1 <= self.window < self.size:
            raise InputError(
                f"A window of 1 or more rows chooses among the keys before it: {self.size} tokens "
                f"with a window of {self.window} leave none to choose."
            )
        if self.pool < 1 or self.pool % 2 == 0:
            raise InputError(f"Keys are averaged with as many on each side: {self.pool} is even.")
        store = partial(Snap, self.size, self.window, self.pool)
        sites = [site for site in model.sites if site.is_main]
        plans = {s.layer: plan_of(store, range(s.n_kv_heads), s.n_kv_heads) for s in sites}
        super().__init__(text_config(model), plans)
