"""Tiny random models that compute attention themselves, without transformers' interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tiny import BASE, stir

SMALL = dict(n_embd=32, n_head=4, n_layer=2, n_positions=64, initializer_range=0.2)
XLM = dict(emb_dim=32, n_layers=2, n_heads=4, bos_index=1, eos_index=2, pad_index=0)
ENDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)

#: name → (model class, its config for a vocabulary of 101 words, what W_O is called)
CAUSAL: dict[str, tuple[str, Callable[[], Any], str]] = {
    "bloom": (
        "BloomForCausalLM",
        lambda: hf.BloomConfig(
            vocab_size=101, hidden_size=32, n_head=4, n_layer=2, initializer_range=0.2
        ),
        "dense",
    ),
    "falcon": ("FalconForCausalLM", lambda: hf.FalconConfig(vocab_size=101, **BASE), "dense"),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        lambda: hf.GPTNeoConfig(
            vocab_size=101,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            initializer_range=0.2,
        ),
        "out_proj",
    ),
    "gptj": (
        "GPTJForCausalLM",
        lambda: hf.GPTJConfig(vocab_size=101, rotary_dim=4, **SMALL),
        "out_proj",
    ),
    "codegen": (
        "CodeGenForCausalLM",
        lambda: hf.CodeGenConfig(vocab_size=101, rotary_dim=4, **SMALL),
        "out_proj",
    ),
    "mpt": (
        "MptForCausalLM",
        lambda: hf.MptConfig(
            vocab_size=101,
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            initializer_range=0.2,
        ),
        "out_proj",
    ),
    "xglm": (
        "XGLMForCausalLM",
        lambda: hf.XGLMConfig(
            vocab_size=101,
            d_model=32,
            ffn_dim=48,
            num_layers=2,
            attention_heads=4,
            max_position_embeddings=64,
            init_std=0.2,
            **ENDS,
        ),
        "out_proj",
    ),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseForCausalLM",
        lambda: hf.GPTNeoXJapaneseConfig(vocab_size=101, **BASE),
        "dense",
    ),
}

#: transformers' own fused and plain attention of it differ (ALiBi counts twice in the plain one)
FUSED = (
    "FalconForCausalLM",
    lambda: hf.FalconConfig(vocab_size=101, **BASE, alibi=True, multi_query=False),
    "dense",
)

ENCODERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "deberta": ("DebertaForMaskedLM", lambda: hf.DebertaConfig(vocab_size=101, **BASE)),
    "deberta-relative": (
        "DebertaForMaskedLM",
        lambda: hf.DebertaConfig(
            vocab_size=101,
            **BASE,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_biased_input=False,
        ),
    ),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        lambda: hf.DebertaV2Config(
            vocab_size=101,
            **BASE,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            share_att_key=True,
        ),
    ),
    "xlnet": (
        "XLNetLMHeadModel",
        lambda: hf.XLNetConfig(
            vocab_size=101, d_model=32, n_layer=2, n_head=4, d_inner=48, initializer_range=0.2
        ),
    ),
    "xlm": ("XLMWithLMHeadModel", lambda: hf.XLMConfig(vocab_size=101, **XLM)),
    "rembert": (
        "RemBertForMaskedLM",
        lambda: hf.RemBertConfig(
            vocab_size=101, **BASE, input_embedding_size=32, output_embedding_size=32
        ),
    ),
    "squeezebert": (
        "SqueezeBertForMaskedLM",
        lambda: hf.SqueezeBertConfig(vocab_size=101, **BASE, embedding_size=32),
    ),
    "funnel": (
        "FunnelForMaskedLM",
        lambda: hf.FunnelConfig(
            vocab_size=101,
            d_model=32,
            n_head=4,
            d_head=8,
            d_inner=48,
            block_sizes=[2, 1],
            initializer_range=0.2,
        ),
    ),
}


def build(made: tuple, **settings: Any) -> Any:
    """The model in evaluation mode, its vectors of parameters random too."""
    torch.manual_seed(0)
    config = made[1]()
    for key, value in settings.items():
        setattr(config, key, value)
    model = getattr(hf, made[0])._from_config(config).eval()
    with torch.no_grad():
        stir(model)
    return model


def eager(made: tuple, model: Any) -> Any:
    """One with the same weights that was made to run its plain attention, and is never tapped."""
    twin = getattr(hf, made[0])._from_config(model.config.__class__(**_own(model)))
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def _own(model: Any) -> dict[str, Any]:
    values = model.config.to_dict()
    values.pop("dtype", None)
    return {**values, "attn_implementation": "eager"}
