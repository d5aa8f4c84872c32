"""A short input for a model, made from its config and its forward's signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from interp_hooks.huggingface.layout import text_config
from interp_hooks.wrapping import device_of, dtype_of

#: rows and tokens of a text
ROWS, TOKENS = 2, 7


def samples_for(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs for the load-time check, the likeliest first: two rows of each input that the model's
    main one and its forward's signature call for; of a text, the second row is left-padded by
    two. Models of two towers want several inputs at once."""
    names = list(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    main = main if main in names else next((n for n in MAKERS if n in names), "input_ids")
    first = _with_partners(model, main, names)
    yield first
    for other in MAKERS:
        if other in names and other not in first:
            yield {**_with_partners(model, other, names), **first}
    several = dict(first)
    for other in MAKERS:
        if other in names and other not in several:
            several.update(_with_partners(model, other, names))
    yield several
    # classifiers that find the end of a text by its padding take one row without
    yield {name: value[:1] for name, value in first.items() if name != "attention_mask"}


def _with_partners(model: Any, main: str, names: list[str]) -> dict[str, torch.Tensor]:
    """One input with its mask, and with what a decoder is given."""
    sample = {main: MAKERS.get(main, _ids)(model)}
    if main == "input_ids" and "attention_mask" in names:
        sample["attention_mask"] = torch.ones(ROWS, TOKENS, dtype=torch.long)
        sample["attention_mask"][1, :2] = 0
    for name in WITH.get(main, ()):
        if name in names:
            sample[name] = MAKERS[name](model)
    if "decoder_input_ids" in names and getattr(model.config, "is_encoder_decoder", False):
        sample["decoder_input_ids"] = _decoder_ids(model)
    return {name: _placed(value, model) for name, value in sample.items()}


def _placed(value: torch.Tensor, model: Any) -> torch.Tensor:
    device = device_of(model)
    if value.is_floating_point():
        return value.to(device, dtype_of(model))
    return value.to(device)


def _vocabulary(config: Any) -> int:
    return int(getattr(config, "vocab_size", None) or 100)


def _rows(tokens: int, vocabulary: int) -> torch.Tensor:
    return (torch.arange(ROWS * tokens).reshape(ROWS, tokens) * 37 + 11) % vocabulary


def _ids(model: Any) -> torch.Tensor:
    config = text_config(model)
    ids = _rows(TOKENS, _vocabulary(config))
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos")}
    plain = next(i for i in range(5, 200) if i not in special)
    for token in special:  # a model that finds padding by itself, or needs one end a row
        if isinstance(token, int):
            ids = torch.where(ids == token, plain % _vocabulary(config), ids)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < _vocabulary(config) and _ends_rows(model):
        ids[:, -1] = end
    return ids


def _ends_rows(model: Any) -> bool:
    """Whether the model reads its answer at the last token of each row (BART's classifier)."""
    return "SequenceClassification" in type(model).__name__


def _decoder_ids(model: Any) -> torch.Tensor:
    config = model.config
    inner = getattr(config, "decoder", None)
    vocabulary = getattr(inner, "vocab_size", None) or _vocabulary(text_config(model))
    ids = _rows(5, int(vocabulary))
    for source in (config, inner, getattr(model, "generation_config", None)):
        start = getattr(source, "decoder_start_token_id", None)
        if isinstance(start, int) and 0 <= start < int(vocabulary):
            ids[:, 0] = start
            break
    return ids


def _sizes(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of a picture."""
    vision = getattr(config, "vision_config", None) or config
    vision = vision if hasattr(vision, "image_size") else getattr(config, "encoder", vision)
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", None) or getattr(config, "num_channels", None)
    channels = channels or getattr(vision, "in_channels", None) or 3
    return int(channels), int(height), int(width)


def _waves(*shape: int) -> torch.Tensor:
    """Numbers between −1 and 1 that differ everywhere."""
    count = 1
    for n in shape:
        count *= n
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.7).reshape(shape)


def _pixels(model: Any) -> torch.Tensor:
    return _waves(ROWS, *_sizes(model.config))


def _video(model: Any) -> torch.Tensor:
    frames = getattr(model.config, "num_frames", None)
    frames = frames or getattr(model.config, "frames_per_clip", None) or 8
    return _waves(ROWS, int(frames), *_sizes(model.config))


def _sound(model: Any) -> torch.Tensor:
    return _waves(ROWS, 4000)


def _features(model: Any) -> torch.Tensor:
    """(batch, mel bins, frames), as Whisper reads sound; (batch, frames, bins) of the others."""
    config = model.config
    inner = getattr(config, "encoder", None) or getattr(config, "audio_config", None) or config
    positions = getattr(inner, "max_source_positions", None)
    bins = getattr(inner, "num_mel_bins", None)
    if bins and positions and getattr(inner, "model_type", "") not in ("speech_to_text",):
        return _waves(ROWS, int(bins), 2 * int(positions))
    width = next(
        (
            int(n)
            for name in (
                "input_feat_per_channel",
                "num_mel_bins",
                "feature_projection_input_dim",
                "input_size",
                "input_dim",
            )
            if (n := getattr(inner, name, None))
        ),
        80,
    )
    return _waves(ROWS, 64, width)


def _boxes(model: Any) -> torch.Tensor:
    """(batch, tokens, 4) corners of words on a page."""
    corner = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS, 1) % 16
    return torch.cat([corner, corner, corner + 4, corner + 3], -1)


#: what makes an input, by its name
MAKERS: dict[str, Callable[[Any], torch.Tensor]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_values": _sound,
    "input_features": _features,
    "pixel_values_videos": _video,
    "bbox": _boxes,
}
#: what else is made beside a main input where the forward takes it
WITH: dict[str, tuple[str, ...]] = {"input_ids": ("bbox",)}
