"""Tiny diffusers models with random weights, none of them 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

_SMALL = dict(num_attention_heads=4, attention_head_dim=8, sample_size=8, patch_size=2)
_JOINT = dict(
    num_layers=2,
    joint_attention_dim=16,
    pooled_projection_dim=16,
    caption_projection_dim=32,
    in_channels=4,
    out_channels=4,
    pos_embed_max_size=8,
)

MODELS: dict[str, Callable[[], Any]] = {
    "dit": lambda: diffusers.DiTTransformer2DModel(
        in_channels=3, out_channels=3, num_layers=2, num_embeds_ada_norm=5, **_SMALL
    ),
    "pixart": lambda: diffusers.PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=16,
        num_embeds_ada_norm=1000,
        **_SMALL,
    ),
    "sd3": lambda: diffusers.SD3Transformer2DModel(**_SMALL, **_JOINT),
    "sd3.5": lambda: diffusers.SD3Transformer2DModel(
        dual_attention_layers=(0,), qk_norm="rms_norm", **_SMALL, **_JOINT
    ),
    "flux": lambda: diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ),
    "unet": lambda: diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    for parameter in module.parameters():
        if not parameter.any():  # gates and last layers begin at 0
            torch.nn.init.normal_(parameter, std=0.1)
    return module
