"""A cache whose keys and values wait in the host's memory, where a GPU has no room for them."""

from __future__ import annotations

import sys
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
    are no weight, stay; models whose layers hold keys beside a state (Falcon-H1) keep everything.

    Args:
        model: the model.
        rows, tokens: of the whole text.

    Returns:
        An empty cache; None on other devices than CUDA's, in a block of `model.caching`, in models
        that are not transformers' or bring a cache of their own, and where keys and values take at
        most half of the memory that is free.

    Example:
        >>> from interp.inputs.host_cache import host_cache
        >>> host_cache(model, 1, 4096) is None  # on a CPU they are there already
        True
    """
    device, config = model.device, getattr(model.module, "config", None)
    if (
        config is None
        or device.type != "cuda"
        or model.gives_caches
        or not hasattr(config, "get_text_config")
    ):
        return None
    if config.is_encoder_decoder or _own_cache(model.module):  # the former's cache is two
        return None
    if bytes_of_keys(model, rows, tokens) <= SHARE * free(model):
        return None
    if any(_keeps_all(layer) and hasattr(layer, "conv_states") for layer in _layers(model)):
        return None  # transformers brings none of these back
    from transformers import DynamicCache

    return DynamicCache(
        config=config.get_text_config(decoder=True), offloading=True, offload_only_non_sliding=True
    )


def _own_cache(module: Any) -> bool:
    """Whether the file that defines the model defines a cache too, which it then insists on."""
    bases = (module, getattr(module, module.base_model_prefix, None))
    files = {type(one).__module__ for one in bases if one is not None}
    return any(
        isinstance(found, type) and name.endswith("Cache") and found.__module__ == file
        for file in files
        for name, found in vars(sys.modules[file]).items()
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
    layers = _layers(model)  # fewer where some share another's keys
    kept = {i for i, layer in enumerate(layers) if _keeps_all(layer)}
    size = next(model.module.parameters()).element_size()
    sites = [site for site in model.sites if site.is_main and site.layer in kept]
    each = sum(site.n_kv_heads * site.d_head for site in sites)
    return 2 * rows * tokens * each * size


def _layers(model: Model) -> list[Any]:
    """transformers' empty cache of the model, layer by layer."""
    from transformers import DynamicCache

    return DynamicCache(config=model.module.config.get_text_config(decoder=True)).layers


def _keeps_all(layer: Any) -> bool:
    """Whether it keeps the keys and values of all tokens."""
    from transformers.cache_utils import DynamicLayer

    return isinstance(layer, DynamicLayer) and not layer.is_sliding


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
