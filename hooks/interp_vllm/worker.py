"""Puts an `Engine` into a worker of vLLM, whose own names it knows."""

from __future__ import annotations

import re
from functools import wraps
from typing import Any

from interp_vllm import guards
from interp_vllm.attention import LayerTap
from interp_vllm.client import TAKE
from interp_vllm.engine import Engine
from interp_vllm.errors import ServingError
from interp_vllm.layout import Layout, learn
from interp_vllm.served import ServedModel


def install(worker: Any) -> Engine | None:
    """Puts edits and statistics into a worker whose model is loaded and whose cache is there; None
    where its engine was not started for them.

    Raises:
        ServingError: an engine or an attention that is not served.
    """
    config, runner = worker.vllm_config, worker.model_runner
    if not guards.enabled(config):
        setattr(worker, TAKE, lambda request: b"")
        return None
    from vllm import __version__
    from vllm.distributed import get_tensor_model_parallel_rank

    guards.check_version(__version__)
    guards.check_config(config)
    layers = attentions(config.compilation_config.static_forward_context)
    model, size = served(config), config.parallel_config.tensor_parallel_size
    if tuple(layers) != model.layers:
        raise ServingError(
            f"{model.name} has {len(model.layers)} layers, and attention in {len(layers)} of them; "
            "edits and statistics inside an engine are for attention in every layer."
        )
    mine = model.rank(get_tensor_model_parallel_rank(), size)
    taps = []
    layouts: dict[Any, Layout] = {}
    for row, (number, layer) in enumerate(layers.items()):
        guards.check_layer(layer.layer_name, layer)
        shape = (layer.num_heads, layer.num_kv_heads, layer.head_size)
        if shape != (mine.n_heads, mine.n_kv_heads, mine.d_head):
            raise ServingError(
                f"{layer.layer_name} has {shape[0]} heads, {shape[1]} of keys, of {shape[2]}, and "
                f"{mine.n_heads}, {mine.n_kv_heads}, {mine.d_head} were expected; edits are for "
                "layers of one size."
            )
        key = (type(layer.impl), tuple(layer.kv_cache.shape[1:]), layer.kv_cache.dtype)
        if key not in layouts:
            layouts[key] = learn(
                layer.kv_cache, layer.num_kv_heads, layer.head_size, layer.head_size, store(layer)
            )
        taps.append(LayerTap(row, mine.site(number), float(layer.impl.scale), layouts[key]))
    engine = Engine(model, taps, runner, get_tensor_model_parallel_rank(), size)
    for tap, layer in zip(taps, layers.values(), strict=True):
        layer.impl.forward = seen(engine, tap, layer.impl.forward)
    runner.execute_model = stepped(engine, runner.execute_model)
    setattr(worker, TAKE, lambda request: packed(engine, request))
    return engine


def attentions(context: Any) -> dict[int, Any]:
    """Layer number → its attention, in order, of the engine's table of layers.

    Raises `ServingError` for a layer with two, or a name without a number.
    """
    found: dict[int, Any] = {}
    for name, layer in context.items():
        if not hasattr(layer, "impl"):  # experts, state spaces
            continue
        numbers = re.findall(r"\.(\d+)(?:\.|$)", name)
        if len(numbers) != 1 or int(numbers[0]) in found:
            raise ServingError(
                f"The attention {name} can't be told by the number of its layer; edits and "
                "statistics are for one attention a layer."
            )
        found[int(numbers[0])] = layer
    return dict(sorted(found.items()))


def served(config: Any, tokenizer: Any = None) -> ServedModel:
    """The whole model that an engine serves, from its configuration."""
    model = config.model_config
    text = model.hf_text_config
    return ServedModel(
        str(model.served_model_name or model.model),
        tuple(range(text.num_hidden_layers)),
        text.num_attention_heads,
        model.get_total_num_kv_heads(),
        model.get_head_size(),
        tokenizer,
    )


def store(layer: Any) -> Any:
    """How a layer's backend writes keys and values into a cache."""

    def write(key: Any, value: Any, cache: Any, slots: Any) -> None:
        layer.impl.do_kv_cache_update(layer, key, value, cache, slots)

    return write


def seen(engine: Engine, tap: LayerTap, own: Any) -> Any:
    """The attention of a layer, told to `engine` after its own kernel."""

    @wraps(own)
    def forward(
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any,
        *args: Any,
        **settings: Any,
    ) -> Any:
        given = own(layer, query, key, value, kv_cache, attn_metadata, output, *args, **settings)
        if attn_metadata is not None:
            engine.at(tap, query, kv_cache, attn_metadata, output)
        return given

    return forward


def stepped(engine: Engine, own: Any) -> Any:
    """A step of the model runner, told to `engine` before and after it."""

    @wraps(own)
    def execute_model(scheduler_output: Any, *args: Any, **settings: Any) -> Any:
        engine.begin(scheduler_output.num_scheduled_tokens, scheduler_output.finished_req_ids)
        given = own(scheduler_output, *args, **settings)
        engine.end()
        return given

    return execute_model


def packed(engine: Engine, request: str) -> bytes:
    """A request's statistics as safetensors; nothing where nothing is kept of it."""
    from safetensors.torch import save

    taken = engine.take(request)
    return b"" if taken is None else save({k: v.contiguous() for k, v in taken.items()})
