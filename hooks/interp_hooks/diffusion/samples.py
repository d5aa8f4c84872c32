"""A short input of a diffusers model, made from its config."""

from __future__ import annotations

import inspect
from typing import Any

import torch

#: tokens of a text, tokens of a picture that is given as tokens, and its side where it is pixels
TEXT, TOKENS, SIDE = 7, 16, 8


def sample_of(module: Any) -> dict[str, Any]:
    """Arguments of the model's forward for one small picture.

    Raises `KeyError` for an argument that must be given and is of no known name.
    """
    config, made = module.config, {}
    weight = next(module.parameters())
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(weight)

    def told(*names: str, default: int = SIDE) -> int:
        values = (config.get(name) for name in names)
        return next((v if isinstance(v, int) else v[0] for v in values if v is not None), default)

    arguments = inspect.signature(module.forward).parameters
    channels, side = told("in_channels", default=4), told("sample_size")
    as_tokens = "img_ids" in arguments
    width = told("joint_attention_dim", "caption_channels", "cross_attention_dim", "text_embed_dim")
    known = {
        "hidden_states": lambda: (
            noise(1, TOKENS, channels) if as_tokens else noise(1, channels, side, side)
        ),
        "sample": lambda: noise(1, channels, side, side),
        "encoder_hidden_states": lambda: noise(1, TEXT, width),
        "pooled_projections": lambda: noise(1, told("pooled_projection_dim")),
        "timestep": lambda: torch.tensor([500.0]).to(weight),
        "class_labels": lambda: torch.zeros(1, dtype=torch.int64, device=weight.device),
        "img_ids": lambda: noise(TOKENS, 3).round(),
        "txt_ids": lambda: torch.zeros(TEXT, 3).to(weight),
        "guidance": lambda: torch.tensor([3.0]).to(weight),
        "added_cond_kwargs": lambda: dict(resolution=None, aspect_ratio=None),
    }
    for name, parameter in arguments.items():
        wanted = parameter.default is inspect.Parameter.empty
        if name == "class_labels":
            wanted = bool(config.get("num_embeds_ada_norm") or config.get("num_class_embeds"))
        elif name == "encoder_hidden_states":
            wanted = any(
                config.get(n)
                for n in ("joint_attention_dim", "caption_channels", "cross_attention_dim")
            )
        elif name == "guidance":
            wanted = bool(config.get("guidance_embeds"))
        elif name == "pooled_projections":
            wanted = bool(config.get("pooled_projection_dim"))
        elif name in ("img_ids", "txt_ids", "timestep", "added_cond_kwargs"):
            wanted = True
        plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if wanted and plain:
            made[name] = known[name]()
    return made
