"""Tiny valid configs of every architecture of the installed transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interp_hooks.conformance.own import OWN

#: numbers of a tiny model by the names that configs give them
WIDTH, HEADS, HEAD_DIM, FFN, VOCABULARY, POSITIONS, WINDOW = 32, 4, 8, 48, 128, 128, 6


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: field name → its value in a tiny model, for fields whose default is a number
SMALL: dict[str, int] = {
    **dict.fromkeys(
        _names(
            "hidden_size d_model n_embd embed_dim dim embedding_size word_embed_proj_dim emb_dim "
            "lru_width input_embedding_size output_embedding_size backbone_hidden_size "
            "conv_pos_width output_hidden_size encoder_hidden_size decoder_hidden_size "
            "hidden_sizes_text linear_attn_hidden_size projection_dim out_hidden_size "
            "text_hidden_size rnn_hidden_size attention_hidden_size ple_embed_dim"
        ),
        WIDTH,
    ),
    **dict.fromkeys(
        _names(
            "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dff dim_ff "
            "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
            "ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size "
            "moe_shared_expert_intermediate_size shared_experts_intermediate_size "
            "feed_forward_size mlp_dim ffn_embed_dim d_inner prompt_mid_dim"
        ),
        FFN,
    ),
    **dict.fromkeys(
        _names(
            "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
            "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
            "swa_num_attention_heads index_n_heads linear_num_heads linear_num_value_heads "
            "num_key_value_heads swa_num_key_value_heads num_kv_heads linear_num_key_heads"
        ),
        HEADS,
    ),
    **dict.fromkeys(
        _names(
            "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
            "num_encoder_layers num_decoder_layers num_encoder_blocks max_window_layers"
        ),
        2,
    ),
    **dict.fromkeys(
        _names(
            "head_dim dim_head d_kv kv_channels attention_head_size swa_head_dim linear_head_dim "
            "linear_key_head_dim linear_value_head_dim v_head_dim qk_nope_head_dim "
            "qk_rope_head_dim index_head_dim attention_head_dim query_pre_attn_scalar "
            "global_head_dim"
        ),
        HEAD_DIM,
    ),
    **dict.fromkeys(
        _names("qk_head_dim mamba_d_state ssm_state_size state_size mamba_d_head mamba_head_dim"),
        2 * HEAD_DIM,
    ),
    **dict.fromkeys(
        _names(
            "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size "
            "encoder_hash_byte_group_vocab ngram_vocab_size_base src_vocab_size tgt_vocab_size "
            "text_vocab_size shape_vocab_size pronunciation_vocab_size entity_vocab_size n_words"
        ),
        VOCABULARY,
    ),
    **dict.fromkeys(
        _names(
            "max_position_embeddings n_positions n_ctx max_seq_len model_max_length "
            "context_length max_target_positions max_sequence_length "
            "original_max_position_embeddings max_encoder_position_embeddings "
            "max_decoder_position_embeddings "
            "max_2d_position_embeddings"
        ),
        POSITIONS,
    ),
    **dict.fromkeys(
        _names(
            "sliding_window attention_window_size window_size local_attention attention_chunk_size "
            "sliding_window_size local_attention_window_len"
        ),
        WINDOW,
    ),
    **dict.fromkeys(
        _names(
            "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num "
            "num_moe_experts moe_num_primary_experts"
        ),
        4,
    ),
    **dict.fromkeys(
        _names(
            "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k topk_group "
            "n_group num_expert_group attn_layer_period sliding_window_pattern "
            "_sliding_window_pattern full_attention_interval global_attn_every_n_layers "
            "layer_group_size no_rope_layer_interval mamba_n_groups n_groups num_hash_functions"
        ),
        2,
    ),
    **dict.fromkeys(
        _names(
            "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace "
            "num_dense_layers moe_layer_start_index attn_layer_offset "
            "prefix_dense_sliding_window_pattern num_random_blocks num_nextn_predict_layers"
        ),
        1,
    ),
    **dict.fromkeys(
        _names(
            "q_lora_rank kv_lora_rank o_lora_rank hidden_size_per_layer_input laurel_rank "
            "index_topk gated_norm_rank hc_lowrank d_rel rel_extent rotary_dim "
            "time_step_rank mamba_dt_rank rnn_heads index_block_size adapter_rank"
        ),
        16,
    ),
    **dict.fromkeys(_names("mamba_n_heads mamba_num_heads n_mamba_heads"), 4),
    **dict.fromkeys(_names("mamba_expand expand"), 2),
    **dict.fromkeys(_names("mamba_chunk_size chunk_size block_size"), 8),
    **dict.fromkeys(
        _names("num_codebooks num_codevectors_per_group num_codevector_groups type_vocab_size"), 2
    ),
    "max_source_positions": 64,
    "rotary_dim": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "codevector_dim": WIDTH,
    "xvector_output_dim": WIDTH,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "keep_window_size": 16,
    "num_kv_shared_layers": 0,
    "shape_embed_dim": 16,
    "pronunciation_embed_dim": 16,
}

#: tokens that must lie inside the tiny vocabulary, in this order from id 0 on
TOKENS = tuple(
    "pad_token_id bos_token_id eos_token_id sep_token_id cls_token_id decoder_start_token_id "
    "forced_bos_token_id forced_eos_token_id mask_token_id unk_token_id eod_token_id".split()
)


def tiny(config_class: Any, own: Mapping[str, Any] | None = None) -> Any:
    """A config of a class with every size made small, what stands in `own` in place of the rules.

    Args:
        config_class: of transformers.
        own: field → value; a dict for a config inside.

    Raises:
        whatever the class raises for such sizes.
    """
    model_type = getattr(config_class, "model_type", "")
    own = {**OWN.get(model_type, {}), **(own or {})}
    defaults = _defaults(config_class)
    values: dict[str, Any] = {}
    parts = getattr(config_class, "sub_configs", {}) or {}
    for name, default in defaults.items():
        if name in parts or name in own:
            continue
        if name in SMALL and _number(default):
            values[name] = min(SMALL[name], max(int(default), 1)) if default else default
        elif name in TOKENS and _outside(default):
            values[name] = 3 + TOKENS.index(name)
        elif name.endswith(("_token_id", "_token_index")) and _outside(default):
            values[name] = VOCABULARY - 1 - sum(map(ord, name)) % 32  # an id of its own for each
    if defaults.get("layer_types") or any(n in values for n in PERIODS):
        values.update({n: 4 for n in LAYERS if n in values})
    kv = next((n for n in KV if n in values), None)
    heads = next((defaults[n] for n in HEADS_OF if _number(defaults.get(n))), None)
    if kv is not None and heads and defaults[kv] < heads:
        values[kv] = 2 if defaults[kv] > 1 else 1
    for name, part in parts.items():
        given, inner = own.get(name), defaults.get(name)
        if name in own and not isinstance(given, Mapping):
            values[name] = given
            continue
        chosen = type(inner) if hasattr(inner, "sub_configs") else part
        if hasattr(chosen, "model_type") and (inner is not None or name in own):
            values[name] = tiny(chosen, given)
    rope = defaults.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("mrope_section") and "head_dim" not in own:
        values["rope_parameters"] = {**rope, "mrope_section": _sections(rope)}
    values.update({k: v for k, v in own.items() if k not in parts})
    return config_class(**values)


PERIODS = ("attn_layer_period", "sliding_window_pattern", "_sliding_window_pattern")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
KV = ("num_key_value_heads", "num_kv_heads")
HEADS_OF = ("num_attention_heads", "n_head", "n_heads", "num_heads")


def _sections(rope: Mapping[str, Any]) -> list[int]:
    """How a small head's rotary dimensions are shared by time, height and width."""
    half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    each = half // 3
    return [half - 2 * each, each, each]


def _outside(value: Any) -> bool:
    """Whether an id lies outside the tiny vocabulary."""
    return _number(value) and value >= VOCABULARY


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _defaults(config_class: Any) -> dict[str, Any]:
    """Field → default of a config class; sub-configs as objects."""
    try:
        config = config_class()
    except Exception:  # some classes have no default: their declared fields then
        return {
            n: getattr(config_class, n, None) for n in getattr(config_class, "__annotations__", {})
        }
    inner = {n: getattr(config, n, None) for n in getattr(config_class, "sub_configs", None) or {}}
    return {**config.to_dict(), **inner}
