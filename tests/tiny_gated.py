"""Tiny random models of the architectures that do something to heads' outputs before W_O reads
them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers as hf
from tiny import stir

BASE = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
SHARED = dict(EXPERTS, shared_expert_intermediate_size=16)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
LATENT = dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_group=1,
    topk_group=1,
)
INDEXED = dict(LATENT, index_n_heads=2, index_head_dim=16, index_topk=64)
INDEXER = dict(
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=8,
    indexer_budget=64,
    indexer_compress_ratio=4,
)
ROUTED = dict(n_routed_experts=2, num_experts_per_tok=1, n_shared_experts=1)

#: module of transformers → (config, model or None for the causal one, what the config is told)
GATED: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "afmoe": ("AfmoeConfig", None, dict(EXPERTS, num_shared_experts=1, num_dense_layers=1)),
    "bailing_hybrid": (
        "BailingHybridConfig",
        None,
        dict(
            LATENT,
            layer_types=LINEAR["layer_types"],
            mlp_layer_types=["dense", "dense"],
            num_local_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
        ),
    ),
    "beam": ("BeamConfig", None, EXPERTS),
    "laguna": ("LagunaConfig", None, SHARED),
    "laguna-per-element": ("LagunaConfig", None, dict(SHARED, gating="per-element")),
    "lfm3": (
        "Lfm3Config",
        None,
        dict(layer_types=["conv", "full_attention"], use_attention_gate=True),
    ),
    "muse_glimmer": ("MuseGlimmerTextConfig", "MuseGlimmerTextModel", {}),
    "muse_spark": (
        "MuseSparkTextConfig",
        "MuseSparkTextModel",
        dict(num_local_experts=2, num_experts_per_tok=1, moe_intermediate_size=16),
    ),
    "neomme": ("NeoMMEConfig", "NeoMMEForMaskedLM", dict(head_dim=16)),
    "qwen3_5": ("Qwen3_5TextConfig", None, LINEAR),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", None, dict(LINEAR, **SHARED)),
    "qwen3_next": ("Qwen3NextConfig", None, dict(LINEAR, **SHARED)),
    "step3p7": (
        "Step3p7TextConfig",
        "Step3p7TextModel",
        dict(
            layer_types=["full_attention", "sliding_attention"],
            sliding_window=6,
            mlp_layer_types=["dense", "dense"],
        ),
    ),
    # a norm over all heads, no gate
    "bitnet": ("BitNetConfig", None, {}),
}
#: their heads' outputs are normed, or cleared of the value, before the gate: it can't be told apart
NORMED = ("bitnet", "muse_spark", "neomme")
#: gated attention that does more with masks than the interface allows for (chosen keys, sinks that
#: differ from query to query), or whose layers run again and again
SECOND: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "axk2": ("AXK2Config", None, dict(INDEXED, **ROUTED)),
    "dots3_note": ("Dots3NoteTextConfig", "Dots3NoteTextModel", dict(INDEXED, **ROUTED)),
    "hrm_text": ("HrmTextConfig", None, {}),
    "hy_v4": ("HYV4Config", None, dict(INDEXED, **ROUTED)),
    "inkling2": ("Inkling2TextConfig", None, ROUTED),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        None,
        dict(LINEAR, **SHARED, **INDEXER),
    ),
}


def build(spec: tuple[str, str | None, dict[str, Any]], name: str) -> Any:
    config_name, model_name, told = spec
    kind = getattr(hf, config_name)
    known = set(getattr(kind, "__dataclass_fields__", {}))
    values = {k: v for k, v in {**BASE, **told}.items() if k in known}
    torch.manual_seed(0)
    if model_name is None:
        model = hf.AutoModelForCausalLM.from_config(kind(**values))
    else:
        folder = name.split("-")[0]
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        model = getattr(module, model_name)(kind(**values))
    stir(model)
    for weight in model.parameters():  # NeoMME starts its output projections at zero
        if weight.ndim == 2 and not bool(weight.any()):
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()
