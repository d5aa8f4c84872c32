"""Tiny vision-language models that read a grid of any size, resample, or cross-attend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from interp_hooks.conformance.vlm_parts import (
    SIDE,
    SQUARE,
    TEXT,
    VISION,
    VOCABULARY,
    Joined,
    Made,
    hf_,
    tokenizer,
)

QWEN = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_VISION: dict[str, Any] = dict(
    depth=2, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3
)


def _grid_tokens(mark: str) -> Callable[[dict[str, Any], int], str]:
    return lambda tensors, k: mark * (int(tensors["image_grid_thw"][k].prod()) // 4)


def _qwen(kind: str, vision: dict[str, Any], text: dict[str, Any]) -> Made:
    hf, words = hf_(), tokenizer(QWEN)
    reader = hf.Qwen2VLImageProcessor(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        size=dict(shortest_edge=64, longest_edge=64 * 64),
    )
    ids = dict(
        zip(
            ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
            words.convert_tokens_to_ids(QWEN),
            strict=True,
        )
    )
    config = getattr(hf, f"{kind}Config")(
        vision_config={**QWEN_VISION, "hidden_size": 32, **vision},
        text_config={**TEXT, **text},
        **ids,
    )
    module = getattr(hf, f"{kind}ForConditionalGeneration")(config)
    return module, Joined(reader, words, QWEN[0], _grid_tokens(QWEN[0]), (QWEN[2], QWEN[3]))


def _rope(*section: int, **more: Any) -> dict[str, Any]:
    rope = dict(rope_type="default", mrope_section=list(section), rope_theta=1e4, **more)
    return dict(rope_parameters=rope)


def qwen2_vl() -> Made:
    return _qwen("Qwen2VL", dict(embed_dim=32, mlp_ratio=2), _rope(1, 1, 2))


def qwen2_5_vl() -> Made:
    vision = dict(
        out_hidden_size=32,
        intermediate_size=48,
        window_size=16,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    )
    return _qwen("Qwen2_5_VL", vision, _rope(1, 1, 2))


def qwen3_vl() -> Made:
    vision = dict(
        out_hidden_size=32,
        intermediate_size=48,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    )
    return _qwen("Qwen3VL", vision, dict(head_dim=8, **_rope(2, 1, 1, mrope_interleaved=True)))


def glm4v() -> Made:
    hf = hf_()
    marks = ["<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>",
             "<|begin_of_video|>", "<|end_of_video|>"]  # fmt: skip
    words = tokenizer(marks)
    reader = hf.Glm4vImageProcessor(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        size=dict(shortest_edge=64, longest_edge=64 * 64 * 2),
    )
    names = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id",
             "video_start_token_id", "video_end_token_id")  # fmt: skip
    config = hf.Glm4vConfig(
        vision_config=dict(
            depth=2,
            hidden_size=32,
            out_hidden_size=32,
            intermediate_size=48,
            num_heads=4,
            patch_size=4,
            image_size=32,
            spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        text_config={**TEXT, **_rope(1, 1, 2)},
        **dict(zip(names, words.convert_tokens_to_ids(marks), strict=True)),
    )
    joined = Joined(reader, words, marks[0], _grid_tokens(marks[0]), (marks[2], marks[3]))
    return hf.Glm4vForConditionalGeneration(config), joined


def blip_2() -> Made:
    hf, words = hf_(), tokenizer(["<image>"])
    reader = hf.BlipImageProcessor(size=SQUARE)
    joined = hf.Blip2Processor(reader, words, num_query_tokens=4)
    text = dict(
        model_type="opt",
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = hf.Blip2Config(
        vision_config=dict(VISION),
        qformer_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        text_config=text,
        num_query_tokens=4,
        image_token_index=joined.tokenizer.convert_tokens_to_ids("<image>"),
    )
    return hf.Blip2ForConditionalGeneration(config), joined


def gemma3() -> Made:
    hf = hf_()
    marks = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    names = ("boi_token", "eoi_token", "image_token")
    words = tokenizer(marks, extra_special_tokens=dict(zip(names, marks, strict=True)))
    reader = hf.Gemma3ImageProcessor(
        size=SQUARE,
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=8,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    joined = hf.Gemma3Processor(reader, words, image_seq_length=4)
    boi, eoi, token = words.convert_tokens_to_ids(marks)
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(
            **{**TEXT, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}
        ),
        vision_config=hf.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_id=token,
        boi_token_index=boi,
        eoi_token_index=eoi,
    )
    module = hf.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # made as zeros, which would hide the image
        module.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.3)
    return module, joined


def paligemma() -> Made:
    hf = hf_()
    words = tokenizer(["<image>"], extra_special_tokens=dict(image_token="<image>"))
    reader = hf.SiglipImageProcessor(size=SQUARE)
    reader.image_seq_length = 16
    joined = hf.PaliGemmaProcessor(reader, words)
    config = hf.PaliGemmaConfig(
        vision_config=dict(
            VISION,
            projection_dim=32,
            vocab_size=VOCABULARY,
            model_type="siglip_vision_model",
            vision_use_head=False,
        ),
        text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        vocab_size=VOCABULARY,
    )
    return hf.PaliGemmaForConditionalGeneration(config), joined


def mllama() -> Made:
    hf = hf_()
    words = tokenizer(["<|image|>"], extra_special_tokens=dict(image_token="<|image|>"))
    reader = hf.MllamaImageProcessor(size=SQUARE, max_image_tiles=4)
    joined = hf.MllamaProcessor(reader, words)
    config = hf.MllamaConfig(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=4,
            image_size=SIDE,
            patch_size=4,
            max_num_tiles=4,
            vision_output_dim=64,
            intermediate_layers_indices=[0],
            supported_aspect_ratios=[
                [1, 1],
                [1, 2],
                [2, 1],
                [2, 2],
                [1, 3],
                [1, 4],
                [3, 1],
                [4, 1],
            ],
        ),
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "rope_parameters": dict(rope_type="default", rope_theta=1e4),
        },
        image_token_index=words.convert_tokens_to_ids("<|image|>"),
    )
    module = hf.MllamaForConditionalGeneration(config)
    with torch.no_grad():  # made as zeros, which would hide the image
        for name, parameter in module.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.8)
    return module, joined


def chameleon() -> Made:
    hf = hf_()
    marks = ["<image>", "<racm3:break>", "<eoss>", *(f"IMGIMG{c}Z" for c in "ABCDEFGH")]
    names = dict(image_token="<image>", boi_token="<racm3:break>", eoi_token="<eoss>")
    words = tokenizer(marks, extra_special_tokens=names)
    reader = hf.ChameleonImageProcessor(size=dict(shortest_edge=SIDE), crop_size=SQUARE)
    joined = hf.ChameleonProcessor(reader, words, image_seq_length=16)
    config = hf.ChameleonConfig(
        **TEXT,
        vq_config=dict(
            embed_dim=8,
            num_embeddings=8,
            latent_channels=8,
            resolution=SIDE,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
            attn_resolutions=None,
        ),
        vocabulary_map={m: words.convert_tokens_to_ids(m) for m in marks},
    )
    return hf.ChameleonForConditionalGeneration(config), joined


def kosmos_2() -> Made:
    hf = hf_()
    config = hf.Kosmos2Config(
        text_config=dict(
            vocab_size=VOCABULARY,
            embed_dim=32,
            ffn_dim=48,
            layers=2,
            attention_heads=4,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        vision_config=dict(VISION),
        latent_query_num=4,
    )
    return hf.Kosmos2ForConditionalGeneration(config), None


def kosmos_inputs() -> dict[str, Any]:
    """A prompt with a picture as Kosmos-2 marks it, whose processor needs its own tokenizer."""
    ids = torch.tensor([[1, 10, *[4] * 4, 11, 20, 21, 22]])
    mask = torch.zeros_like(ids)
    mask[:, 2:6] = 1
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return dict(input_ids=ids, pixel_values=pixels, image_embeds_position_mask=mask)
