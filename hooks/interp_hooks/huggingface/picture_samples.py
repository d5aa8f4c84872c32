"""Short inputs with a picture for vision-language models, made from their config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from interp_hooks.huggingface.images import image_token
from interp_hooks.huggingface.layout import text_config
from interp_hooks.wrapping import device_of, dtype_of

#: prompts, each with one picture
ROWS = 2
#: words before and after a picture
BEFORE, AFTER = 3, 3


def picture_samples(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Prompts with a picture each, in the forms that vision-language models take; the first one
    that the model runs on is right."""
    names = set(inspect.signature(model.forward).parameters)
    for pictures in _pictures(model.config, names):
        pictures = {k: _placed(v, model) for k, v in pictures.items()}
        try:
            tokens = _tokens(model, pictures)
        except Exception:  # the model takes another form; its code may raise anything
            continue
        if tokens:
            yield {**_prompts(model, tokens, names), **pictures}


def _placed(value: torch.Tensor, model: Any) -> torch.Tensor:
    device = device_of(model)
    return value.to(device, dtype_of(model)) if value.is_floating_point() else value.to(device)


def _pictures(config: Any, names: set[str]) -> Iterator[dict[str, torch.Tensor]]:
    vision = config.vision_config
    channels = _first(vision, ("in_channels", "in_chans", "num_channels"), 3)
    if "image_grid_thw" in names:
        patch = _first(vision, ("patch_size",), 14)
        times = _first(vision, ("temporal_patch_size",), 1)
        merge = _first(vision, ("spatial_merge_size", "merge_size"), 2)
        side = 2 * merge
        numbers = _waves(ROWS * side**2, channels * times * patch**2)
        grid = torch.tensor([[1, side, side]] * ROWS)
        yield dict(pixel_values=numbers, image_grid_thw=grid)
    height, width = _size(config, vision)
    sizes = dict(image_sizes=torch.tensor([[height, width]] * ROWS))
    for tiles in ((), (1,), (2,), (3,), (5,)):
        pixels = dict(pixel_values=_waves(ROWS, *tiles, channels, height, width))
        yield pixels
        if "image_sizes" in names:
            yield {**pixels, **sizes}


def _first(config: Any, names: tuple[str, ...], default: int) -> int:
    values = (getattr(config, name, None) for name in names)
    value = next((v for v in values if v), default)
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _size(config: Any, vision: Any) -> tuple[int, int]:
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 224
    if isinstance(size, dict):
        size = size.get("height", 224), size.get("width", 224)
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) else (size, size)


def _waves(*shape: int) -> torch.Tensor:
    """Numbers between −1 and 1 that differ everywhere."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.7).reshape(shape)


@torch.no_grad()
def _tokens(model: Any, pictures: dict[str, torch.Tensor]) -> int:
    """How many tokens each picture has in the prompt."""
    takes = inspect.signature(model.get_image_features).parameters
    out = model.get_image_features(**{k: v for k, v in pictures.items() if k in takes})
    out = getattr(out, "pooler_output", out)
    parts = list(out) if isinstance(out, (list, tuple)) else [out]
    parts = [p for part in parts for p in (part if isinstance(part, (list, tuple)) else [part])]
    count = sum(p.numel() // p.shape[-1] for p in parts)
    return count // ROWS if count % ROWS == 0 else 0


def _prompts(model: Any, tokens: int, names: set[str]) -> dict[str, torch.Tensor]:
    """(rows, tokens) ids and mask, the second prompt shorter by one word and padded on the left."""
    config = model.config
    text, image = text_config(model), image_token(config)
    taken = {image, getattr(config, "video_token_id", None)}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "vision_start_token_id"):
        taken |= {getattr(text, name, None), getattr(config, name, None)}
    size = int(getattr(text, "vocab_size", None) or 100)
    words = [i for i in range(size) if i not in taken][: BEFORE + AFTER]
    start = getattr(config, "vision_start_token_id", None)
    opening = [start] if isinstance(start, int) else []
    row = [*words[:BEFORE], *opening, *[image] * tokens, *words[BEFORE:]]
    ids = torch.tensor([row, [words[-1], *row[1:]]], device=device_of(model))
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    made = dict(input_ids=ids, attention_mask=mask)
    if "mm_token_type_ids" in names:
        made["mm_token_type_ids"] = torch.as_tensor(ids == image).int()
    if "token_type_ids" in names:
        made["token_type_ids"] = torch.as_tensor(ids == image).long()
    return made
