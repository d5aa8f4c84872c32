"""Prompts with images, read on: what follows them is given (teacher forcing)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel


def continued(
    model: HookedModel, inputs: Mapping[str, Any], tokens: Sequence[int]
) -> dict[str, Any]:
    """The inputs of one prompt with these tokens after it, as the model itself would write them.

    Args:
        model: a vision-language model.
        inputs: as `interp.vision.with_images` makes them, one sample.
        tokens: what follows.

    Example:
        >>> from interp.vision.continued import continued
        >>> continued(model, {"input_ids": torch.tensor([[5, 6]])}, [7])["input_ids"].tolist()
        [[5, 6, 7]]
    """
    more = torch.tensor([list(tokens)], dtype=torch.long)
    # PaliGemma's prompt (0) is read in both directions, what follows it (1) is not
    kind = int(getattr(model.module.config, "model_type", "") == "paligemma")
    following = dict(
        input_ids=more,
        attention_mask=torch.ones_like(more),
        token_type_ids=torch.full_like(more, kind),
        mm_token_type_ids=torch.zeros_like(more),
    )
    made = dict(inputs)
    for name, after in following.items():
        if (before := inputs.get(name)) is not None:
            made[name] = torch.cat([before, after.to(before)], 1)
    return made
