"""A cache whose keys and values wait in the host's memory, where a GPU has no room for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from interp_hooks.protocol import Model

#: Share of the GPUs' free memory that keys and values may take before they wait elsewhere: the
#: rest is a layer's work on a chunk.
SHARE = 0.5


def host_cache(model: Model, rows: int, tokens: int) -> Any | None:
    """transformers' offloaded cache for a text read in chunks, or None where there is room.

    Of all layers only one has its keys and values on the device, and the next one's are on their
    way to it; the others' are in the host's memory. Layers with a sliding window, whose few keys
    are no weight, stay.

    Args:
        model: the model.
        rows, tokens: of the whole text.

    Returns:
        An empty cache; None on a CPU, in a block of `model.caching`, in models that are not
        transformers', and where keys and values take at most half of the memory that is free.

    Example:
        >>> from interp.inputs.host_cache import host_cache
        >>> host_cache(model, 1, 4096) is None  # on a CPU they are there already
        True
    """
    device, config = model.device, getattr(model.module, "config", None)
    if (
        config is None
        or device.type == "cpu"
        or model.gives_caches
        or not hasattr(config, "get_text_config")
    ):
        return None
    if config.is_encoder_decoder:  # whose cache is two
        return None
    if bytes_of_keys(model, rows, tokens) <= SHARE * free(model):
        return None
    from transformers import DynamicCache

    return DynamicCache(
        config=config.get_text_config(decoder=True), offloading=True, offload_only_non_sliding=True
    )


def bytes_of_keys(model: Model, rows: int, tokens: int) -> int:
    """Bytes of the keys and values of a text, in the layers that keep all of them: not in those
    with a sliding window or a state.

    Example:
        >>> from interp.inputs.host_cache import bytes_of_keys
        >>> bytes_of_keys(model, 1, 1000) == 2 * 4 * 1000 * sum(
        ...     site.n_kv_heads * site.d_head for site in model.sites
        ... )
        True
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    text = model.module.config.get_text_config(decoder=True)
    layers = DynamicCache(config=text).layers  # fewer where some share another's keys
    kept = {i for i, layer in enumerate(layers) if type(layer) is DynamicLayer}
    size = next(model.module.parameters()).element_size()
    sites = [site for site in model.sites if site.is_main and site.layer in kept]
    each = sum(site.n_kv_heads * site.d_head for site in sites)
    return 2 * rows * tokens * each * size


def free(model: Model) -> int:
    """Bytes that are free on the GPUs that hold the model's weights, those that this process holds
    unused included."""
    devices = {p.device for p in model.module.parameters() if p.is_cuda} or {model.device}
    total = 0
    for device in devices:
        left, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        total += left + unused
    return total
