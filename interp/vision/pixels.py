"""A picture as the input of a model that reads pictures alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import InputError
from interp.vision.reading import read_image
from interp_hooks.wrapping import dtype_of

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

#: the mean and standard deviation of red, green and blue in the pictures that families of models
#: were trained on, by how their model types begin; others: 0.5 and 0.5
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
COLOURS = {
    "clip": _CLIP,
    "chinese_clip": _CLIP,
    "altclip": _CLIP,
    "blip": _CLIP,
    "dino": _IMAGENET,
    "deit": _IMAGENET,
    "ijepa": _IMAGENET,
    "swin": _IMAGENET,
    "pvt": _IMAGENET,
    "segformer": _IMAGENET,
}


def pixels(model: HookedModel, picture: Any) -> dict[str, torch.Tensor]:
    """Inputs of one picture, as the model's image processor makes them; without a processor, the
    picture resized to the model's own size (bilinear) and normalised by `colours`.

    Args:
        model: a model that reads pictures alone.
        picture: in any form that `read_image` takes.

    Raises:
        InputError: no picture; a processor that refuses it; no processor, and a config that does
            not say how large pictures are.
    """
    shown = read_image(picture)
    processor = getattr(model.processor, "image_processor", model.processor)
    if processor is None:
        return dict(pixel_values=_resized(model, shown).to(dtype_of(model.module)))
    try:
        tensors = processor(images=[shown], return_tensors="pt")
    except (ValueError, IndexError, TypeError) as error:
        raise InputError(f"The processor of {model.name} refuses this image: {error}") from error
    return {
        name: value.to(dtype_of(model.module)) if value.is_floating_point() else value
        for name, value in tensors.items()
        if name in model.accepts and isinstance(value, torch.Tensor)
    }


def colours(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of the colours, by the config's model type."""
    kind = str(getattr(config, "model_type", ""))
    known = (numbers for start, numbers in COLOURS.items() if kind.startswith(start))
    return next(known, ((0.5,) * 3, (0.5,) * 3))


def assumed(model: HookedModel) -> str | None:
    """What was assumed of the pictures, in a sentence; None where the model has a processor."""
    if model.processor is not None:
        return None
    height, width = _size(model)
    mean, std = colours(model.module.config)
    return (
        f"{model.name} came without its image processor (preprocessor_config.json, or processor=), "
        f"so pictures were resized to {height} × {width} and normalised with mean {_said(mean)} "
        f"and standard deviation {_said(std)}, as is usual for its kind."
    )


def _said(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{n:.3g}" for n in dict.fromkeys(numbers))


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None) or config


def _size(model: HookedModel) -> tuple[int, int]:
    """(height, width). Raises `InputError` where the config doesn't say."""
    size = getattr(_vision(model.module.config), "image_size", None)
    if not size:
        raise InputError(
            f"{model.name} came without its image processor, and its config does not say how large "
            "its pictures are; give the processor to interp.load as processor=."
        )
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def _resized(model: HookedModel, picture: Any) -> torch.Tensor:
    """(1, channels, height, width)."""
    from PIL import Image

    height, width = _size(model)
    channels = getattr(_vision(model.module.config), "num_channels", None) or 3
    if channels != 3:
        raise InputError(
            f"{model.name} came without its image processor and reads pictures of {channels} "
            "channels; give the processor to interp.load as processor=."
        )
    small = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    mean, std = (torch.tensor(c, dtype=torch.float64) for c in colours(model.module.config))
    values = (torch.from_numpy(small.copy()).double() / 255 - mean) / std  # (rows, columns, 3)
    return values.permute(2, 0, 1)[None].float()
