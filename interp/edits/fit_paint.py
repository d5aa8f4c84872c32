"""PAINT fitted to a prompt: which of its image's tokens are local, and which sum it up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from interp.edits.paint import PAINT
from interp.errors import InputError
from interp.vision.class_token import cls_attention
from interp.vision.prompts import checked
from interp_hooks.heads import Head

#: PAINT's: the share of patches that are local, the fences of outliers in interquartile ranges, and
#: the share of evenly spaced patches
LOCAL_SHARE, FENCE, SPATIAL_SHARE = 0.25, 1.5, 0.05


def summary_patches(attention: torch.Tensor) -> torch.Tensor:
    """(images, patches) bool: those above Q3 + 1.5 (Q3 − Q1) of the image's patches, quartiles
    interpolated."""
    a = attention.double()
    low, high = a.quantile(0.25, -1, keepdim=True), a.quantile(0.75, -1, keepdim=True)
    return a > high + FENCE * (high - low)


def local_patches(attention: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
    """(images, patches) bool: the top 25 % of the image's patches (rounded down) without the
    summary ones."""
    best = attention.topk(int(LOCAL_SHARE * attention.shape[-1]), -1).indices
    return torch.zeros_like(summary).scatter_(-1, best, True) & ~summary


def spatial_patches(patches: int) -> torch.Tensor:
    """(patches,) bool: every g-th patch from the first, g = ⌊N / n⌋ of N patches with n = ⌊N / 20⌋.

    The last patch is never one, as in the released code. Raises `InputError` for fewer than 20.
    """
    count = int(SPATIAL_SHARE * patches)
    if not count:
        raise InputError(
            f"5 % of {patches} patches are none; spatial=True needs pictures of at least 20."
        )
    chosen = torch.zeros(patches, dtype=torch.bool)
    chosen[: patches - 1 : patches // count] = True
    return chosen


def paint_for(
    model: Any,
    inputs: Mapping[str, Any],
    alpha: float = 0.7,
    beta: float = 0.35,
    first_layer: int = 2,
    spatial: bool = False,
) -> tuple[PAINT, PAINT]:
    """The two PAINT edits of a prompt with an image, for local and for summary tokens.

    Ready for ``with model.edit(*paint_for(model, inputs)): model.generate(**inputs)`` (Arif et al.
    2025, arXiv 2501.12206).

    local: s += α |s| on the top 25 % of patches by attention of the class token in the *first*
    layer of the vision tower, summed over heads, without the summary ones; summary: s += β |s| on
    the patches whose attention in its layer −2 exceeds Q3 + 1.5 (Q3 − Q1). Both in all heads of
    text layers from `first_layer` (from 0) on. With `spatial` 5 % of the patches, evenly spaced in
    reading order, are local too. Guidance between the prompt with and without image is
    `interp.procedures.ImageGuidance`.

    Args:
        model: a vision-language model whose tower has a class token, or what `interp.load` takes.
        inputs: as `interp.vision.with_images` or the model's processor makes them, left-padded; a
            batch has a set for each sample.
        alpha, beta: 0.7 and 0.3 to 0.4 in the paper.
        first_layer: the first text layer edited.
        spatial: every g-th patch is local too (those that are not summary ones), 5 % in all. The
            released code has evenly spaced patches where it keeps some of an image's tokens, and
            not where it raises logits: that they join the local ones is this project's reading.

    Returns:
        (local, summary).

    Raises:
        InputError: a text-only model, a prompt without image, right padding, a tower without class
            token, image tokens that are not one a patch, a `first_layer` that the model has not,
            `spatial` with fewer than 20 patches.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["Is there a red circle?"], [picture])
        >>> [edit.alpha for edit in interp.edits.paint_for(model, inputs)]
        [0.7, 0.35]
    """
    from interp.loading import load

    hooked = load(model)
    checked(hooked, inputs, "PAINT")
    heads = tuple(Head(s.layer, h) for s in hooked.sites if s.is_main and s.layer >= first_layer
                  for h in range(s.n_heads))  # fmt: skip
    if not heads:
        raise InputError(
            f"PAINT edits text layers from {first_layer} on, and {hooked.name} has "
            f"{hooked.n_layers}."
        )
    patches = cls_attention(hooked, inputs, (0, -2), what="PAINT")
    summary = summary_patches(patches.attention[-2])
    local = local_patches(patches.attention[0], summary)
    if spatial:
        local |= spatial_patches(local.shape[-1]) & ~summary
    shape = inputs["input_ids"].shape
    return PAINT(patches.keys(local, *shape), alpha, heads), PAINT(
        patches.keys(summary, *shape), beta, heads
    )
