"""A cache in which some kv heads keep the first and the recent tokens only."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from interp.edits.gate import Gate
from interp.errors import EditError
from interp_hooks.huggingface.held_cache import HeldCache, Plan, plan_of
from interp_hooks.key_stores import Streaming


class HeadCache(HeldCache):
    """A cache for `generate` in which streaming kv heads hold sink + recent tokens, the others all.

    It computes what the edit `Gate` shows (DuoAttention, Xiao et al., ICLR 2025, arXiv 2410.10819):
    the same logits, up to rounding, with a cache that is smaller by what is let go. A kv head that
    streams holds ``sink + recent − 1`` tokens, 2·d_head numbers each, however long the text. In a
    prompt, too, it attends to sink + recent tokens alone, in blocks of 1,024 rows.

    Layers with a sliding window of their own keep it. Edits and statistics that read attention
    weights are refused beside it, since they would need the keys that are gone.

    Args:
        model: a loaded HuggingFace model.
        gate: a `Gate` whose α are 0 or 1, or a file of DuoAttention's with such gates.

    Attributes:
        nbytes: bytes of keys and values held now, in all layers.

    Raises:
        EditError: α between 0 and 1 (`Gate.read` rounds them), a model without queries and keys.
        TapError: a model whose layers have caches of their own kinds.

    Example:
        >>> gate = interp.edits.Gate({"L3H0": 0.0, "L3H1": 0.0}, sink=2, recent=6)
        >>> cache = interp.caches.HeadCache(model, gate)
        >>> ids = torch.arange(20, 60)[None]
        >>> out = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        >>> with model.edit(gate):
        ...     gated = model.generate(ids, max_new_tokens=8, do_sample=False)
        >>> bool((out == gated).all())
        True
        >>> all_of_it = 4 * 4 * 47 * 2 * 32 * 4  # layers, kv heads, tokens, k and v, d, bytes
        >>> round(cache.nbytes / all_of_it, 3)  # two of 16 kv heads hold 7 tokens of 47
        0.894
    """

    def __init__(self, model: Any, gate: Gate | str | os.PathLike[str]) -> None:
        self.gate = gate if isinstance(gate, Gate) else Gate(gate)
        self.gate.bind(model)  # heads that are not there are told
        super().__init__(text_config(model), plans(model, self.gate))


def plans(model: Any, gate: Gate) -> dict[int, Plan]:
    """Layer → its kv heads and their stores. Raises `EditError` for gates between 0 and 1."""
    found: dict[int, Plan] = {}
    for site in model.sites:
        if not site.is_main or not gate.at(site):
            continue
        by_query = gate.gates(site, torch.device("cpu")).detach()
        alpha = by_query[:: site.n_heads // site.n_kv_heads]
        if not bool(((alpha == 0) | (alpha == 1)).all()):
            raise EditError(
                f"A cache keeps all keys of a kv head or it doesn't: the gates of {site.place} lie "
                "between 0 and 1; round them with Gate.read(FILE, sparsity=...) or threshold=."
            )
        streaming = (alpha == 0).nonzero().flatten().tolist()
        if streaming:
            store = partial(Streaming, gate.sink, gate.recent)
            found[site.layer] = plan_of(store, streaming, site.n_kv_heads)
    return found


def text_config(model: Any) -> Any:
    """The config of the language model. Raises `EditError` where there is none of transformers'."""
    config = getattr(model.module, "config", None)
    text = getattr(config, "get_text_config", None)
    if text is None:
        raise EditError(
            "A cache that holds keys head by head is transformers'; load the HuggingFace model."
        )
    return text(decoder=True)
