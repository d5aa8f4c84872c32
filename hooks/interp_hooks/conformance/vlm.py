"""Tiny random vision-language models, each with what its real image processor makes of a picture.

Nothing is downloaded: configs are small, tokenizers a list of words. Processors that need
torchvision for videos, or at all, are stood in for by their image processor joined with the
tokenizer as they join them (`Joined`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from interp_hooks.conformance import vlm_grids, vlm_tiles
from interp_hooks.conformance.vlm_parts import PROMPT, Made, picture, stir


class PictureModel(NamedTuple):
    """A model with inputs of one prompt with one picture, and of two prompts of which one is
    left-padded, and its processor (None: there is none that runs here)."""

    module: Any
    inputs: dict[str, Any]
    padded: dict[str, Any] | None
    processor: Any


FAMILIES: dict[str, Callable[[], Made]] = {
    "llava": vlm_tiles.llava,
    "llava_siglip": vlm_tiles.llava_siglip,
    "llava_next": vlm_tiles.llava_next,
    "llava_onevision": vlm_tiles.llava_onevision,
    "pixtral": vlm_tiles.pixtral,
    "mistral3": vlm_tiles.mistral3,
    "aya_vision": vlm_tiles.aya_vision,
    "internvl": vlm_tiles.internvl,
    "idefics2": vlm_tiles.idefics2,
    "idefics3": vlm_tiles.idefics3,
    "smolvlm": vlm_tiles.smolvlm,
    "qwen2_vl": vlm_grids.qwen2_vl,
    "qwen2_5_vl": vlm_grids.qwen2_5_vl,
    "qwen3_vl": vlm_grids.qwen3_vl,
    "glm4v": vlm_grids.glm4v,
    "blip-2": vlm_grids.blip_2,
    "gemma3": vlm_grids.gemma3,
    "paligemma": vlm_grids.paligemma,
    "llama4": vlm_tiles.llama4,
    "mllama": vlm_grids.mllama,
    "chameleon": vlm_grids.chameleon,
    "kosmos-2": vlm_grids.kosmos_2,
}


def build(model_type: str, seed: int = 0) -> PictureModel:
    """A tiny random model of a family with inputs: a prompt with a picture, as its processor makes
    them, and two prompts with a picture each, one left-padded.

    Raises:
        KeyError: a family that has no builder here.
    """
    torch.manual_seed(seed)
    module, processor = FAMILIES[model_type]()
    stir(module.eval())
    if processor is None:
        return PictureModel(module, vlm_grids.kosmos_inputs(), None, None)
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
