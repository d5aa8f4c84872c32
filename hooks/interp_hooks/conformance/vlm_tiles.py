"""Tiny vision-language models that read a picture whole or in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from interp_hooks.conformance.vlm_parts import (
    PINPOINTS,
    SIDE,
    SQUARE,
    TEXT,
    VISION,
    Joined,
    Made,
    hf_,
    tokenizer,
)


def llava() -> Made:
    hf, words = hf_(), tokenizer(["<image>"])
    reader = hf.CLIPImageProcessor(size=dict(shortest_edge=SIDE), crop_size=SQUARE)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    joined = hf.LlavaProcessor(
        reader,
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return hf.LlavaForConditionalGeneration(config), joined


def llava_siglip() -> Made:
    hf, words = hf_(), tokenizer(["<image>"])
    reader = hf.SiglipImageProcessor(size=SQUARE)
    config = hf.LlavaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    joined = hf.LlavaProcessor(reader, words, patch_size=4, vision_feature_select_strategy="full")
    return hf.LlavaForConditionalGeneration(config), joined


def llava_next() -> Made:
    hf, words = hf_(), tokenizer(["<image>"])
    reader = hf.LlavaNextImageProcessor(
        size=dict(shortest_edge=SIDE), crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
    )
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    joined = hf.LlavaNextProcessor(
        reader,
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return hf.LlavaNextForConditionalGeneration(config), joined


def llava_onevision() -> Made:
    hf, words = hf_(), tokenizer(["<image>", "<video>"])
    reader = hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    module = hf.LlavaOnevisionForConditionalGeneration(config)

    def count(tensors: dict[str, Any], k: int) -> str:
        # as LlavaOnevisionProcessor counts, whose video processor needs torchvision
        side = tensors["pixel_values"].shape[-2:]
        size = tensors["image_sizes"][k].tolist()
        number = hf.LlavaOnevisionProcessor._get_number_of_features
        stub = type("Stub", (), {})()
        stub.num_image_tokens, stub.image_processor = (SIDE // 4) ** 2, reader
        stub.vision_aspect_ratio = config.vision_aspect_ratio
        stub._get_unpadded_features = lambda *a: hf.LlavaOnevisionProcessor._get_unpadded_features(
            stub, *a
        )
        return "<image>" * number(stub, *size, *side)

    return module, Joined(reader, words, "<image>", count)


def _mistral_like(merge: int) -> tuple[Any, Any, Any]:
    hf, words = hf_(), tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    step = 4 * merge
    reader = hf.PixtralImageProcessor(
        size=dict(longest_edge=8 * step), patch_size=dict(height=step, width=step)
    )

    def rows(tensors: dict[str, Any], k: int) -> str:  # PixtralProcessor needs torchvision
        height, width = tensors["image_sizes"][k]
        line = "[IMG]" * (int(width) // step)
        return "[IMG_BREAK]".join([line] * (int(height) // step)) + "[IMG_END]"

    vision = hf.PixtralVisionConfig(**{**VISION, "image_size": 8 * step, "head_dim": 8})
    joined = Joined(reader, words, "[IMG]", rows)
    return joined, words.convert_tokens_to_ids("[IMG]"), vision


def pixtral() -> Made:
    hf = hf_()
    joined, token, vision = _mistral_like(1)
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.MistralConfig(**TEXT, head_dim=8),
        image_token_index=token,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return hf.LlavaForConditionalGeneration(config), joined


def mistral3() -> Made:
    hf = hf_()
    joined, token, vision = _mistral_like(2)
    config = hf.Mistral3Config(
        vision_config=vision,
        text_config=hf.MistralConfig(**TEXT, head_dim=8),
        image_token_index=token,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return hf.Mistral3ForConditionalGeneration(config), joined


def aya_vision() -> Made:
    hf = hf_()
    marks = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>",
             "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"]  # fmt: skip
    words = tokenizer([*marks, *(f"TILE_{i}" for i in range(1, 13))])
    reader = hf.GotOcr2ImageProcessor(
        size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=12
    )
    joined = hf.AyaVisionProcessor(reader, words, patch_size=4, img_size=SIDE, downsample_factor=2)
    config = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION),
        text_config={**TEXT, "model_type": "cohere2", "sliding_window": 64},
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    )
    return hf.AyaVisionForConditionalGeneration(config), joined


def internvl() -> Made:
    hf = hf_()
    words = tokenizer(["<img>", "</img>", "<IMG_CONTEXT>", "<video>"])
    reader = hf.GotOcr2ImageProcessor(
        size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=12
    )
    config = hf.InternVLConfig(
        vision_config={**VISION, "image_size": (SIDE, SIDE), "patch_size": (4, 4)},
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
        image_seq_length=4,
    )

    def count(tensors: dict[str, Any], k: int) -> str:
        return "<img>" + "<IMG_CONTEXT>" * 4 * int(tensors["num_patches"][k]) + "</img>"

    module = hf.InternVLForConditionalGeneration(config)
    return module, Joined(reader, words, "<IMG_CONTEXT>", count)


def _idefics_words() -> Any:
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    return tokenizer(
        ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    )


def idefics2() -> Made:
    hf, words = hf_(), _idefics_words()
    reader = hf.Idefics2ImageProcessor(
        size=dict(shortest_edge=SIDE, longest_edge=SIDE), do_image_splitting=False
    )
    joined = hf.Idefics2Processor(reader, words, image_seq_len=4)
    config = hf.Idefics2Config(
        vision_config=dict(VISION),
        perceiver_config=dict(
            hidden_size=32,
            resampler_n_latents=4,
            resampler_depth=1,
            resampler_n_heads=4,
            resampler_head_dim=8,
            num_key_value_heads=2,
        ),
        text_config={**TEXT, "model_type": "mistral"},
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    return hf.Idefics2ForConditionalGeneration(config), joined


def _idefics3(kind: str) -> Made:
    hf, words = hf_(), _idefics_words()
    options: dict[str, Any] = dict(
        size=dict(longest_edge=2 * SIDE),
        max_image_size=dict(longest_edge=SIDE),
        do_image_splitting=True,
    )
    reader = getattr(hf, f"{kind}ImageProcessor")(**options)
    joined = hf.Idefics3Processor(hf.Idefics3ImageProcessor(**options), words, image_seq_len=4)
    joined.image_processor = reader
    config = getattr(hf, f"{kind}Config")(
        vision_config=dict(VISION),
        text_config={**TEXT, "model_type": "llama"},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), joined


def idefics3() -> Made:
    return _idefics3("Idefics3")


def smolvlm() -> Made:
    return _idefics3("SmolVLM")


class Tiles:
    """Llama 4's way of cutting, which needs torchvision: two tiles side by side and the whole
    picture."""

    def __call__(self, images: Sequence[Any], **more: Any) -> dict[str, Any]:
        tiles: list[torch.Tensor] = []
        for image in images:
            wide = image.resize((2 * SIDE, SIDE))
            parts = [wide.crop((0, 0, SIDE, SIDE)), wide.crop((SIDE, 0, 2 * SIDE, SIDE))]
            for part in (*parts, image.resize((SIDE, SIDE))):
                pixels = torch.from_numpy(np.asarray(part).copy()).permute(2, 0, 1).float()
                tiles.append(pixels / 127.5 - 1)
        return dict(pixel_values=torch.stack(tiles))


def llama4() -> Made:
    hf = hf_()
    marks = ["<|image|>", "<|patch|>", "<|image_start|>", "<|image_end|>",
             "<|tile_x_separator|>", "<|tile_y_separator|>"]  # fmt: skip
    words = tokenizer(marks)
    patches = marks[1] * 4
    line = f"{marks[2]}{patches}{marks[4]}{patches}{marks[5]}{marks[0]}{patches}{marks[3]}"
    config = hf.Llama4Config(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=128,  # of the shuffled patches, 32 × 4
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=4,
            pixel_shuffle_ratio=0.5,
            projector_input_dim=32,
            projector_output_dim=32,
            vision_output_dim=32,
        ),
        text_config={
            **TEXT,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 128,
        },
        image_token_index=words.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=words.convert_tokens_to_ids(marks[2]),
        eoi_token_index=words.convert_tokens_to_ids(marks[3]),
    )
    module = hf.Llama4ForConditionalGeneration(config)
    return module, Joined(Tiles(), words, "<|image|>", lambda tensors, k: line)
