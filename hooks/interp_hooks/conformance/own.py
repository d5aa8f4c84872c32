"""What single architectures need beside the general rules of `configs`."""

from __future__ import annotations

from typing import Any

_MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1)
_SWIN = dict(
    image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
)


def _rotary(*sections: int) -> dict[str, Any]:
    """A text config whose rotary dimensions are shared by time, height and width so."""
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=list(sections))
    return dict(text_config=dict(rope_parameters=rope))


_MIXED = ["linear_attention", "full_attention"]

#: model type → field → value; a dict for a config inside
OWN: dict[str, dict[str, Any]] = {
    "bamba": dict(_MAMBA, num_hidden_layers=4, attn_layer_indices=[1, 3]),
    "granitemoehybrid": dict(
        _MAMBA, num_hidden_layers=4, layer_types=["mamba", "attention", "mamba", "attention"]
    ),
    "kimi_linear": dict(num_hidden_layers=4, layer_types=_MIXED * 2),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "cohere_compass_text": dict(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, hidden_size=32),
    ),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots1": dict(num_experts_per_tok=2, n_routed_experts=4, n_shared_experts=1),
    "falcon_h1": dict(_MAMBA, mamba_d_ssm=64),
    "gpt_neo": dict(num_layers=4, attention_types=[[["global", "local"], 2]]),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "lfm2_moe": dict(num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(num_heads=8, head_dim=8),
    "ministral": dict(head_dim=8),
    "nemotron": dict(num_key_value_heads=2),
    "zamba": dict(
        num_hidden_layers=6,
        attn_layer_period=2,
        attn_layer_offset=1,
        attention_hidden_size=64,
        attention_head_dim=16,
        layers_block_type=["mamba", "hybrid"] * 3,
    ),
    "zamba2": dict(
        num_hidden_layers=6,
        layers_block_type=["mamba", "hybrid"] * 3,
        mamba_headdim=8,
        n_mamba_heads=8,
        attention_hidden_size=64,
        attention_head_dim=16,
        kv_channels=16,
        num_query_groups=4,
    ),
    "gemma3_text": dict(head_dim=8),
    "gemma3n_text": dict(
        num_hidden_layers=4, laurel_rank=8, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "gemma4_text": dict(
        num_hidden_layers=4,
        global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma4_unified_text": dict(
        num_hidden_layers=4,
        global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "qwen4_exp_text": dict(
        num_hidden_layers=4,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=16,
        indexer_compress_ratio=4,
        hc_count=2,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=2,
        heads_per_ngram=2,
    ),
    "reformer": dict(
        is_decoder=True,
        axial_pos_shape=[8, 16],
        axial_pos_embds_dim=[16, 16],
        attn_layers=["local", "lsh"],
        lsh_attn_chunk_length=4,
        local_attn_chunk_length=4,
        num_buckets=4,
    ),
    "esm": dict(vocab_size=128, pad_token_id=1, mask_token_id=32),
    "esmc": dict(vocab_size=128),
    "led": dict(attention_window=4, encoder_layers=2, decoder_layers=2),
    "longformer": dict(attention_window=4),
    "mpnet": dict(relative_attention_num_buckets=32),
    "canary": dict(encoder_config=dict(num_mel_bins=80)),
    "cohere_asr": dict(encoder_config=dict(num_mel_bins=80)),
    "parakeet_ctc": dict(encoder_config=dict(num_mel_bins=80)),
    "lasr_ctc": dict(encoder_config=dict(num_mel_bins=80)),
    "swin": dict(_SWIN),
    "swinv2": dict(_SWIN),
    "donut-swin": dict(_SWIN),
    "levit": dict(image_size=64, patch_size=16),
    "glm46v": _rotary(2, 1, 1),
    "glm_ocr": _rotary(2, 1, 1),
    "glmga": _rotary(2, 1, 1),
    "glm4v_moe": _rotary(1, 1, 0),
    "vipllava": dict(vision_feature_layers=[-1, -2]),
    "xlstm": dict(qk_dim_factor=1.0),
    "xmod": dict(languages=["en_XX"], default_language="en_XX"),
}

_CONVOLUTIONS = "convolutions have no attention"
_STATES = "a state space model has no attention"

#: architectures without softmax attention, and what they have instead
NO_SOFTMAX: dict[str, str] = {
    "bit": _CONVOLUTIONS,
    "convnext": _CONVOLUTIONS,
    "convnextv2": _CONVOLUTIONS,
    "efficientnet": _CONVOLUTIONS,
    "falcon_mamba": _STATES,
    "fnet": "Fourier transforms in place of attention",
    "focalnet": "focal modulation in place of attention",
    "hgnet_v2": _CONVOLUTIONS,
    "mamba": _STATES,
    "mamba2": _STATES,
    "mobilenet_v1": _CONVOLUTIONS,
    "mobilenet_v2": _CONVOLUTIONS,
    "mobilevitv2": "separable attention, a softmax over no keys",
    "pp_lcnet": _CONVOLUTIONS,
    "regnet": _CONVOLUTIONS,
    "resnet": _CONVOLUTIONS,
    "rwkv": "a linear recurrence has no attention",
    "swiftformer": "additive attention, a softmax over no keys",
    "textnet": _CONVOLUTIONS,
    "xlstm": "a recurrence has no attention",
    "yoso": "Bernoulli samples of hashes in place of a softmax",
}
