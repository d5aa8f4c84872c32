"""Tiny vision-language models of families without a builder of their own: any small valid config,
and pixels in the first form that the model itself takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from interp_hooks.conformance.configs import tiny
from interp_hooks.conformance.vlm_parts import stir
from interp_hooks.huggingface.images import image_token

#: words before and after the image
BEFORE, AFTER = [3, 5], [7, 11, 13, 17, 6, 19, 8]


class Unbuilt(Exception):
    """No tiny model of the family that reads a picture could be made."""


def build(model_type: str) -> tuple[Any, dict[str, Any]]:
    """(model, inputs) of a family: one prompt with one picture.

    Raises:
        Unbuilt: a model that takes no image tokens, or none of the forms of pixels that are tried.
        whatever transformers raises for its config.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    name = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    config = tiny(model_class.config_class)
    config._attn_implementation = "eager"
    token = image_token(config)
    if token is None:
        raise Unbuilt(f"{model_type} has no token of images.")
    module = model_class(config).eval()
    stir(module)
    for pixels in _forms(config):
        inputs = _fitting(module, token, pixels)
        if inputs is not None:
            return module, inputs
    raise Unbuilt(f"{model_type} takes none of the forms of pixels that are tried.")


def _forms(config: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Pixels of one picture as processors give them."""
    vision = getattr(config, "vision_config", None)
    size = getattr(vision, "image_size", None) or 16
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    generator = torch.Generator().manual_seed(4)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    patch = getattr(vision, "patch_size", None) or 4
    patch = patch if isinstance(patch, int) else patch[0]
    frames = getattr(vision, "temporal_patch_size", None)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    for depth in dict.fromkeys((frames or 1, 1, 2)):
        grid = torch.tensor([[1, 4, 4]])
        yield dict(
            pixel_values=noise(16, channels * depth * patch**2),
            image_grid_thw=grid,
        )
        yield dict(pixel_values=noise(16, channels, patch, patch), image_grid_thw=grid)
    sizes = torch.tensor([[height, width]])
    yield dict(pixel_values=noise(1, 3, height, width))
    yield dict(pixel_values=noise(1, 3, height, width), image_sizes=sizes)
    mask = torch.ones(1, 1, height, width, dtype=torch.bool)
    yield dict(pixel_values=noise(1, 1, 3, height, width), pixel_attention_mask=mask)
    yield dict(pixel_values=noise(1, 1, 3, height, width))
    yield dict(pixel_values=noise(1, 2, 3, height, width), image_sizes=sizes)


@torch.no_grad()
def _fitting(module: Any, token: int, pixels: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """Inputs with as many image tokens as the model makes of these pixels, with which it runs and
    which it looks at; None where there are none."""
    accepts = inspect.signature(module.forward).parameters
    try:
        n = _features(module, pixels)
        row = torch.tensor([[*BEFORE, *[token] * n, *AFTER]])
        inputs: dict[str, Any] = dict(input_ids=row, **pixels)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in accepts:
                inputs[name] = (row == token).int()
        one = module(**inputs).logits
        other = module(**{**inputs, "pixel_values": -pixels["pixel_values"]}).logits
    except Exception:  # another form is tried: an architecture's code may raise anything
        return None
    seen = bool(torch.isfinite(one).all()) and float((one - other)[:, -1].abs().max()) > 1e-6
    return inputs if seen else None


def _features(module: Any, pixels: dict[str, torch.Tensor]) -> int:
    """How many tokens the model makes of the pixels."""
    out = module.get_image_features(**pixels)
    out = getattr(out, "pooler_output", out)
    parts = out if isinstance(out, (list, tuple)) else [out]
    return sum(part.numel() // part.shape[-1] for part in parts)
