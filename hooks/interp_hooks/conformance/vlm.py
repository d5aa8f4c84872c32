"""Tiny random vision-language models, each with what its real image processor makes of a picture.

Nothing is downloaded: configs are small, tokenizers a list of words. Processors that need
torchvision for videos, or at all, are stood in for by their image processor joined with the
tokenizer as they join them (`Joined`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

WORDS = (
    "describe the picture : what is in first second image a b c cat dog red blue left right top "
    "half and here are some crops to help you see better original"
).split()
VOCABULARY = 192
SIDE = 16  # of a tower's picture, in pixels; patches of 4
PROMPT = "describe the picture :"

TEXT: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=4,
)
SQUARE = dict(height=SIDE, width=SIDE)
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


class PictureModel(NamedTuple):
    """A model with inputs of one prompt with one picture, and of two prompts of which one is
    left-padded, and its processor (None: there is none that runs here)."""

    module: Any
    inputs: dict[str, Any]
    padded: dict[str, Any] | None
    processor: Any


Made = tuple[Any, Any]  # the model, its processor


def tokenizer(special: Sequence[str] = (), **more: Any) -> Any:
    """A tokenizer of a few words and these special tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for word in (*special, *WORDS):
        vocabulary.setdefault(word, len(vocabulary))
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(special),
        padding_side="left",
        **more,
    )
    return made


class Joined:
    """An image processor and a tokenizer joined as a processor joins them: each mark of an image in
    a text becomes its tokens, `expand(tokens of the image)`."""

    chat_template = None

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        mark: str,
        count: Callable[[dict[str, Any], int], str],
        ends: tuple[str, str] | None = None,
    ) -> None:
        self.image_processor, self.tokenizer, self.image_token = image_processor, tokenizer, mark
        self._tokens = count
        if ends is not None:
            self.vision_start_token, self.vision_end_token = ends

    def __call__(
        self, images: Any = None, text: Any = None, padding: bool = False, **more: Any
    ) -> dict[str, Any]:
        flat = [p for g in images for p in (g if isinstance(g, (list, tuple)) else [g])]
        tensors = dict(self.image_processor(images=flat, return_tensors="pt"))
        written, k = [], 0
        for line in [text] if isinstance(text, str) else text:
            first, *others = line.split(self.image_token)
            for other in others:
                first += self._tokens(tensors, k) + other
                k += 1
            written.append(first)
        tensors.pop("num_patches", None)
        tokens = self.tokenizer(written, padding=padding, return_tensors="pt")
        tensors.update(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        if "image_grid_thw" in tensors:
            image = self.tokenizer.convert_tokens_to_ids(self.image_token)
            tensors["mm_token_type_ids"] = (tensors["input_ids"] == image).int()
        return tensors


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Any:
    """A picture of noise."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _hf() -> Any:
    import transformers

    return transformers


def llava() -> Made:
    hf, words = _hf(), tokenizer(["<image>"])
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
    hf, words = _hf(), tokenizer(["<image>"])
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
    hf, words = _hf(), tokenizer(["<image>"])
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
    hf, words = _hf(), tokenizer(["<image>", "<video>"])
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
    hf, words = _hf(), tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
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
    hf = _hf()
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
    hf = _hf()
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
    hf = _hf()
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
    hf = _hf()
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
    hf, words = _hf(), _idefics_words()
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
    hf, words = _hf(), _idefics_words()
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


QWEN = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_VISION: dict[str, Any] = dict(
    depth=2, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3
)


def _grid_tokens(mark: str) -> Callable[[dict[str, Any], int], str]:
    return lambda tensors, k: mark * (int(tensors["image_grid_thw"][k].prod()) // 4)


def _qwen(kind: str, vision: dict[str, Any], text: dict[str, Any]) -> Made:
    hf, words = _hf(), tokenizer(QWEN)
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
    hf = _hf()
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
    hf, words = _hf(), tokenizer(["<image>"])
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
    hf = _hf()
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
    hf = _hf()
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
    hf = _hf()
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


def mllama() -> Made:
    hf = _hf()
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
    hf = _hf()
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
    hf = _hf()
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


FAMILIES: dict[str, Callable[[], Made]] = {
    "llava": llava,
    "llava_siglip": llava_siglip,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "pixtral": pixtral,
    "mistral3": mistral3,
    "aya_vision": aya_vision,
    "internvl": internvl,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "glm4v": glm4v,
    "blip-2": blip_2,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "llama4": llama4,
    "mllama": mllama,
    "chameleon": chameleon,
    "kosmos-2": kosmos_2,
}


def build(model_type: str, seed: int = 0) -> PictureModel:
    """A tiny random model of a family with inputs: a prompt with a picture, as its processor makes
    them, and two prompts with a picture each, one left-padded.

    Raises:
        KeyError: a family that has no tiny model here.
    """
    torch.manual_seed(seed)
    module, processor = FAMILIES[model_type]()
    stir(module.eval())
    if processor is None:
        return PictureModel(module, _kosmos_inputs(), None, None)
    inputs = ask(processor, [PROMPT], [[picture()]])
    pictures = [[picture(seed=1)], [picture(seed=2)]]
    # BLIP-2 puts padding between its image and the text
    padded = None if model_type == "blip-2" else ask(processor, [PROMPT, "a cat"], pictures)
    return PictureModel(module, inputs, padded, processor)


def ask(processor: Any, texts: Sequence[str], pictures: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What the processor makes of texts with their pictures before them, left-padded."""
    from interp_hooks.huggingface.images import image_mark

    lines = [f"{image_mark(processor) * len(g)} {t}" for t, g in zip(texts, pictures, strict=True)]
    single = len(texts) == 1 and len(pictures[0]) == 1
    images = list(pictures[0]) if single else [list(group) for group in pictures]
    return dict(processor(images=images, text=lines, padding=len(texts) > 1, return_tensors="pt"))


def _kosmos_inputs() -> dict[str, Any]:
    ids = torch.tensor([[1, 10, *[4] * 4, 11, 20, 21, 22]])
    mask = torch.zeros_like(ids)
    mask[:, 2:6] = 1
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return dict(input_ids=ids, pixel_values=pixels, image_embeds_position_mask=mask)


@torch.no_grad()
def stir(module: torch.nn.Module, scale: float = 0.25) -> None:
    """Weights that make heads differ and attention peaky, the same for the same model."""
    generator = torch.Generator().manual_seed(3)
    for part in module.modules():
        if not isinstance(part, (torch.nn.Linear, torch.nn.Embedding)):
            continue
        weight = part.weight
        weight.copy_((torch.randn(weight.shape, generator=generator) * scale).to(weight))
