"""What an engine must be for its heads to be edited and read: refused by name where it is not."""

from __future__ import annotations

from typing import Any

from interp_vllm.errors import ServingError

#: versions of vLLM that this was tested with: from the first, below the second
VERSIONS = ((0, 32, 0), (0, 33, 0))
#: how an engine is asked for it
ENABLED = (
    'additional_config={"interp": True} (vllm serve: --additional-config \'{"interp": true}\')'
)


def enabled(config: Any) -> bool:
    """Whether an engine was started for edits and statistics of its requests."""
    extra = getattr(config, "additional_config", None)
    return isinstance(extra, dict) and bool(extra.get("interp"))


def check_version(version: str) -> None:
    """Raise `ServingError` for a vLLM that this was not tested with.

    Example:
        >>> check_version("0.32.1+cpu")
    """
    parts = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        parts.append(int(digits) if digits else 0)
    if not VERSIONS[0] <= tuple(parts) < VERSIONS[1]:
        low, high = (".".join(map(str, v)) for v in VERSIONS)
        raise ServingError(
            f"interp_vllm was tested with vLLM from {low} up to, not including, {high}, and this "
            f"is {version}: its attention is private and changes; install a tested one."
        )


def check_config(config: Any) -> None:
    """Raise `ServingError` for an engine in which edits or statistics would be silently wrong, or
    were never tested.

    Args:
        config: the `VllmConfig`.
    """
    for reason in _reasons(config):
        raise ServingError(f"Edits and statistics of heads can't be served {reason}.")


def _reasons(config: Any) -> list[str]:
    parallel, found = config.parallel_config, []
    if config.use_v2_model_runner:
        found.append(
            "by vLLM's second model runner, whose requests are kept otherwise; set "
            "VLLM_USE_V2_MODEL_RUNNER=0"
        )
    mode = getattr(config.compilation_config, "cudagraph_mode", None)
    if mode is not None and mode.has_full_cudagraphs():
        found.append(
            "with full CUDA graphs, in which a request's settings would freeze; start with "
            'compilation_config={"cudagraph_mode": "PIECEWISE"}'
        )
    if config.speculative_config is not None:
        found.append("with speculative decoding, whose rejected tokens would count; leave it out")
    if getattr(config, "kv_transfer_config", None) is not None:
        found.append("where keys and values come from another engine; leave the connector out")
    for name, what in (
        ("pipeline_parallel_size", "pipeline"),
        ("data_parallel_size", "data"),
        ("decode_context_parallel_size", "decode context"),
        ("prefill_context_parallel_size", "prefill context"),
    ):
        if (getattr(parallel, name, 1) or 1) > 1:
            found.append(f"with {what} parallelism, which was not tested; tensor parallelism is")
    if getattr(parallel, "enable_dbo", False):
        found.append("with batches split in two (enable_dbo); leave that out")
    if str(config.cache_config.cache_dtype) not in ("auto", "float32", "float16", "bfloat16"):
        found.append(
            f"from a quantised cache ({config.cache_config.cache_dtype}); use kv_cache_dtype auto"
        )
    if getattr(config.model_config, "runner_type", "generate") != "generate":
        found.append("by an engine that does not generate")
    return found


def check_layer(name: str, layer: Any) -> None:
    """Raise `ServingError` for an attention layer whose weights are not softmax(scale·q·k) over all
    keys before it."""
    impl = layer.impl
    if not hasattr(layer, "num_heads") or not hasattr(impl, "do_kv_cache_update"):
        raise ServingError(
            f"{name} attends by {type(impl).__name__}, whose store of keys and values can't be "
            "learnt; edits and statistics are for plain attention."
        )
    for what, there in (
        ("an encoder's attention", getattr(layer, "attn_type", "decoder") != "decoder"),
        ("a sliding window", getattr(layer, "sliding_window", None) is not None),
        ("soft-capped logits", bool(getattr(impl, "logits_soft_cap", None))),
        ("learned sinks", getattr(impl, "sinks", None) is not None),
        ("position biases (ALiBi)", getattr(impl, "alibi_slopes", None) is not None),
        ("another layer's cache", getattr(layer, "kv_sharing_target_layer_name", None) is not None),
        ("chunks of keys", "Chunked" in type(layer).__name__),
        ("values of another width", getattr(layer, "head_size_v", 0) not in (0, layer.head_size)),
    ):
        if there:
            raise ServingError(
                f"{name} has {what}, which edits and statistics inside an engine do not know; "
                "model.edit and model.observe do."
            )
