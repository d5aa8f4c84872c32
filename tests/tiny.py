"""Tiny random models for the tests, and plain eager references that know nothing of the tap."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as hf

BASE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=128,
    initializer_range=0.2,
)
GQA = dict(BASE, num_key_value_heads=2)
WINDOW = 6
CONFIGS: dict[str, Callable[[int], Any]] = {
    "llama": lambda v: hf.LlamaConfig(vocab_size=v, **GQA),
    "gpt2": lambda v: hf.GPT2Config(
        vocab_size=v,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen2": lambda v: hf.Qwen2Config(vocab_size=v, **GQA),  # grouped keys with biases
    "qwen3": lambda v: hf.Qwen3Config(vocab_size=v, **GQA, head_dim=8),
    "gemma2": lambda v: hf.Gemma2Config(
        vocab_size=v,
        **GQA,
        head_dim=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
    ),
    "mistral": lambda v: hf.MistralConfig(vocab_size=v, **GQA, sliding_window=WINDOW),
    "gpt_oss": lambda v: hf.GptOssConfig(
        vocab_size=v,
        **GQA,
        head_dim=8,
        sliding_window=WINDOW,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
    "phi3": lambda v: hf.Phi3Config(
        vocab_size=v, **GQA, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "olmo2": lambda v: hf.Olmo2Config(vocab_size=v, **GQA),
    "neox": lambda v: hf.GPTNeoXConfig(vocab_size=v, **BASE),
    "opt": lambda v: hf.OPTConfig(
        vocab_size=v,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        init_std=0.2,
    ),
    "gemma3": lambda v: hf.Gemma3TextConfig(
        vocab_size=v, **GQA, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8
    ),
}

#: built by name too, for the tests that are about what they do otherwise
OTHERS: dict[str, Callable[[int], Any]] = {
    "granite": lambda v: hf.GraniteConfig(
        vocab_size=v,
        **GQA,
        residual_multiplier=0.3,
        embedding_multiplier=2.0,
        attention_multiplier=0.2,
        logits_scaling=2.0,
        eos_token_id=2,
    ),
}


def build(name: str, vocabulary: int = 101, seed: int = 0, **overrides: Any) -> Any:
    """A tiny random causal language model. Biases, norms and sink logits are random too, so that
    nothing is trivial."""
    torch.manual_seed(seed)
    config = (CONFIGS | OTHERS)[name](vocabulary)
    for key, value in overrides.items():
        setattr(config, key, value)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    stir(model)
    return model


@torch.no_grad()
def stir(model: torch.nn.Module) -> None:
    """Add noise to every vector of parameters (they start as constants)."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)


def eager(model: Any) -> Any:
    """A copy that runs transformers' eager attention and is never tapped."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin.eval()


def window_of(config: Any, layer: int) -> int | None:
    """The sliding window of a layer, from the config alone."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return config.sliding_window if kinds[layer] == "sliding_attention" else None
    return getattr(config, "sliding_window", None)


def visible(mask: torch.Tensor, window: int | None) -> torch.Tensor:
    """(batch, 1, queries, keys) bool: real query, real key, not later, inside the window."""
    n = mask.shape[1]
    distance = torch.arange(n)[:, None] - torch.arange(n)[None]
    seen = (distance >= 0) & (distance < (window or n + 1))
    real = mask.bool()
    return seen[None, None] & real[:, None, None, :] & real[:, None, :, None]


@torch.no_grad()
def attentions(model: Any, **inputs: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """([A (batch, heads, queries, keys) float64 of each layer], logits) of an eager model."""
    out = model(**inputs, output_attentions=True, use_cache=False)
    return [a.double() for a in out.attentions], out.logits


def layers(model: Any) -> list[Any]:
    """The attention modules in order, by the names transformers gives them."""
    for trunk in (
        model,
        getattr(model, "model", None),
        getattr(model, "transformer", None),
        getattr(model, "gpt_neox", None),
    ):
        for inner in (trunk, getattr(trunk, "decoder", None)):
            found = getattr(inner, "layers", None) or getattr(inner, "h", None)
            if found is not None:
                return [
                    getattr(b, "self_attn", None) or getattr(b, "attn", None) or b.attention
                    for b in found
                ]
    raise LookupError(type(model).__name__)


def turns(model: Any, layer: int, places: torch.Tensor) -> torch.Tensor:
    """(n, d, d) float64: how a key at each of these positions is turned against one at 0, of the
    cosines and sines that the model's own rotary module gives, first half against second."""
    rotary = getattr(model, "gpt_neox", None) or model.model
    kinds = getattr(model.config, "layer_types", None)
    more = {"layer_type": kinds[layer]} if "gemma3" in model.config.model_type else {}
    cos, sin = (x[0].double() for x in rotary.rotary_emb(torch.zeros(1), places[None], **more))
    once = model.config.model_type == "gpt_oss"  # the others give each angle twice
    half = cos.shape[1] if once else cos.shape[1] // 2
    factor = rotary.rotary_emb(torch.zeros(1), torch.zeros(1, 1).long(), **more)[0].double()[
        0, 0, 0
    ]
    c, s = cos[:, :half] / factor, sin[:, :half] / factor  # without YaRN's
    made = torch.eye(8, dtype=torch.float64).repeat(len(places), 1, 1)
    for i in range(half):
        made[:, i, i] = made[:, half + i, half + i] = c[:, i]
        made[:, i, half + i], made[:, half + i, i] = -s[:, i], s[:, i]
    return made


def output_module(attention: Any) -> Any:
    """The projection after the heads."""
    return next(
        getattr(attention, n)
        for n in ("o_proj", "c_proj", "out_proj", "dense")
        if hasattr(attention, n)
    )


@contextmanager
def rewriting_z(
    model: Any, layer: int, change: Callable[[torch.Tensor], torch.Tensor], heads: int = 4
) -> Iterator[None]:
    """Pass z (batch, queries, heads, d) of a layer through `change`, by a pre-hook of the output
    projection."""

    def hook(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        z = args[0].reshape(*args[0].shape[:2], heads, -1)
        return (change(z).to(z.dtype).reshape(args[0].shape),)

    handle = output_module(layers(model)[layer]).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def reading_values(
    model: Any, layer: int, store: dict[int, torch.Tensor], heads: int = 4
) -> Iterator[None]:
    """store[layer] = values (batch, heads, keys, d) float64, each kv head repeated for its query
    heads."""
    attention = layers(model)[layer]

    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        value = output if hasattr(attention, "v_proj") else output[..., -output.shape[-1] // 3 :]
        kv = 4 if not hasattr(attention, "v_proj") else value.shape[-1] // attention.head_dim
        split = value.reshape(*value.shape[:2], kv, -1).transpose(1, 2).double()
        store[layer] = split.repeat_interleave(heads // kv, 1)

    handle = (
        attention.v_proj if hasattr(attention, "v_proj") else attention.c_attn
    ).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids with the first real token at 0."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)
