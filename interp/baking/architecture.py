"""A module for baked weights: the model's own class, or where its output projections have no bias
and one is needed, a class that computes the same and has them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from interp.errors import InputError

#: config class → what it has that Llama's has not, and what that must be for Llama to be the same
AS_LLAMA: dict[str, dict[str, Any]] = {
    "Qwen2Config": {"use_sliding_window": False},
    "MistralConfig": {"sliding_window": None},
}
#: settings that are not handed on to another class
OWN = ("model_type", "architectures", "transformers_version", "layer_types", "max_window_layers")


def rebuilt(
    module: Any, weights: Mapping[str, torch.Tensor], biases: Mapping[str, torch.Tensor]
) -> Any:
    """A module with the model's weights, those of `weights` and `biases` in their place; it shares
    what did not change.

    Raises:
        InputError: there is no place for a bias.
    """
    state = {**module.state_dict(), **weights, **biases}
    for kind, config in _candidates(module, biases):
        new = _built(kind, config, state)
        if new is not None:
            new.generation_config = copy.deepcopy(getattr(module, "generation_config", None))
            return new.eval()
    layer = next(iter(biases))
    raise InputError(
        f"{type(module).__name__} has no bias of its output projections ({layer}), so that there "
        "is no place for what stands in for a head; bake gains or mode zero, or edit while the "
        "model runs (--edit)."
    )


def _candidates(module: Any, biases: Mapping[str, torch.Tensor]) -> Iterator[tuple[Any, Any]]:
    """Classes with their configs that may have a place for all."""
    import transformers

    config = copy.deepcopy(module.config)
    yield type(module), config
    if not biases:
        return
    if getattr(config, "attention_bias", None) is False:
        config = copy.deepcopy(config)
        config.attention_bias = True
        yield type(module), config
    wanted = AS_LLAMA.get(type(config).__name__)
    if wanted is not None and all(getattr(config, k, v) == v for k, v in wanted.items()):
        settings = {k: v for k, v in config.to_dict().items() if k not in (*OWN, *wanted)}
        settings |= dict(attention_bias=True, mlp_bias=False)
        yield transformers.LlamaForCausalLM, transformers.LlamaConfig(**settings)


def _built(kind: Any, config: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """The module, with biases that the weights have not at 0; None where they don't fit it."""
    with torch.device("meta"):
        new = kind(config)
    names = new.state_dict()
    missing = [name for name in names if name not in state]
    if any(not name.endswith("bias") for name in missing) or any(n not in names for n in state):
        return None
    like = next(iter(state.values()))
    zeros = {n: torch.zeros(names[n].shape, dtype=like.dtype, device=like.device) for n in missing}
    new.load_state_dict({**state, **zeros}, assign=True)
    new.tie_weights()
    return new
