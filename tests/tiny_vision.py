"""Tiny random vision-language models of every family, each with an input: (model, inputs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import torch
import transformers as hf

IMAGE = 99
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=120,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
)
QWEN = dict(
    image_token_id=IMAGE, video_token_id=98, vision_start_token_id=97, vision_end_token_id=96
)
QWEN_VISION = dict(
    depth=2, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3
)
Made = tuple[Any, dict[str, torch.Tensor]]


def ids(n: int, start: tuple[int, ...] = ()) -> torch.Tensor:
    """A few words, n image tokens, a few words."""
    return torch.tensor([[1, 3, 4, 5, *start, *[IMAGE] * n, 20, 21, 22, 23]])


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def rope(*section: int, **more: Any) -> dict[str, Any]:
    return dict(
        rope_parameters=dict(
            rope_type="default", mrope_section=list(section), rope_theta=1e4, **more
        )
    )


def llava(**vision: Any) -> Made:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**{**VISION, **vision}),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )
    return hf.LlavaForConditionalGeneration(config), dict(
        input_ids=ids(16), pixel_values=pixels(1, 3, 16, 16)
    )


def llava_next() -> Made:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    # the whole picture, and two tiles as 4 rows of 8 patches with a token at the end of each row
    given = dict(
        input_ids=ids(16 + 4 * 9),
        pixel_values=pixels(1, 3, 3, 16, 16),
        image_sizes=torch.tensor([[16, 32]]),
    )
    return hf.LlavaNextForConditionalGeneration(config), given


def _qwen(kind: Any, config: Any) -> Made:
    row = ids(4, (97,))
    given = dict(
        input_ids=row, pixel_values=pixels(16, 3 * 2 * 16), image_grid_thw=torch.tensor([[1, 4, 4]])
    )
    return kind(config), {**given, "mm_token_type_ids": (row == IMAGE).int()}


def qwen2_vl() -> Made:
    vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    text = {**TEXT, **rope(1, 1, 2)}
    return _qwen(
        hf.Qwen2VLForConditionalGeneration,
        hf.Qwen2VLConfig(vision_config=vision, text_config=text, **QWEN),
    )


def qwen2_5_vl() -> Made:
    more = dict(
        hidden_size=32,
        out_hidden_size=32,
        intermediate_size=48,
        window_size=8,
        fullatt_block_indexes=[1],
    )
    vision = {**QWEN_VISION, **more, "tokens_per_second": 2}
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision, text_config={**TEXT, **rope(1, 1, 2)}, **QWEN
    )
    return _qwen(hf.Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl() -> Made:
    more = dict(
        hidden_size=32, out_hidden_size=32, intermediate_size=48, num_position_embeddings=16
    )
    vision = {**QWEN_VISION, **more, "deepstack_visual_indexes": [0]}
    text = {**TEXT, "head_dim": 8, **rope(2, 1, 1, mrope_interleaved=True)}
    return _qwen(
        hf.Qwen3VLForConditionalGeneration,
        hf.Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN),
    )


def _idefics(kind: Any, config: Any) -> Made:
    whole = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    return kind(config), dict(
        input_ids=ids(4), pixel_values=pixels(1, 1, 3, 16, 16), pixel_attention_mask=whole
    )


def idefics3() -> Made:
    text = {**TEXT, "model_type": "llama"}
    config = hf.Idefics3Config(
        vision_config=VISION, text_config=text, image_token_id=IMAGE, scale_factor=2
    )
    return _idefics(hf.Idefics3ForConditionalGeneration, config)


def smolvlm() -> Made:
    text = {**TEXT, "model_type": "llama"}
    config = hf.SmolVLMConfig(
        vision_config=VISION, text_config=text, image_token_id=IMAGE, scale_factor=2
    )
    return _idefics(hf.SmolVLMForConditionalGeneration, config)


def paligemma() -> Made:
    vision = dict(VISION, projection_dim=32, vocab_size=120, model_type="siglip_vision_model")
    config = hf.PaliGemmaConfig(
        vision_config=vision,
        text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=120,
    )
    row = torch.tensor([[*[IMAGE] * 16, 1, 5, 6, 7, 8]])
    given = dict(
        input_ids=row, pixel_values=pixels(1, 3, 16, 16), token_type_ids=torch.zeros_like(row)
    )
    return hf.PaliGemmaForConditionalGeneration(config), {
        **given,
        "attention_mask": torch.ones_like(row),
    }


def internvl() -> Made:
    vision = {**VISION, "image_size": (16, 16), "patch_size": (4, 4)}
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=IMAGE,
        downsample_ratio=0.5,
        image_seq_length=4,
    )
    return hf.InternVLForConditionalGeneration(config), dict(
        input_ids=ids(4), pixel_values=pixels(1, 3, 16, 16)
    )


def gemma3() -> Made:
    text = hf.Gemma3TextConfig(
        **{**TEXT, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}
    )
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=hf.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_index=97,
        eoi_token_index=98,
    )
    row = ids(4, (97,))
    given = dict(
        input_ids=row, token_type_ids=(row == IMAGE).long(), pixel_values=pixels(1, 3, 16, 16)
    )
    module = hf.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # made as zeros, which would hide the image
        module.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.3)
    return module, {**given, "attention_mask": torch.ones_like(row)}


FAMILIES: dict[str, Callable[[], Made]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "paligemma": paligemma,
    "internvl": internvl,
    "gemma3": gemma3,
}


def build(name: str) -> Made:
    """A family's model with weights that make its heads differ."""
    torch.manual_seed(0)
    module, given = FAMILIES[name]()
    tiny.stir(module.eval())
    return module, given
