"""Which tokens of a vision-language model's prompt are the image's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from interp_hooks.errors import TapError


class ImageSpan(NamedTuple):
    """Slots start … stop − 1 of the padded sequence hold image tokens."""

    start: int
    stop: int


def image_token(config: Any) -> int | None:
    """The id of the token that stands for a piece of an image, None for models that take none."""
    if getattr(config, "vision_config", None) is None:
        return None
    for name in ("image_token_id", "image_token_index"):
        token = getattr(config, name, None)
        if token is not None:
            return int(token)
    return None


def image_mask(config: Any, input_ids: torch.Tensor) -> torch.Tensor | None:
    """(batch, slots) bool: the image's tokens; None for models that take no images."""
    token = image_token(config)
    return None if token is None else input_ids == token


def grid_of_patches(vision: Any) -> tuple[int, int] | None:
    """Rows and columns of the patches that a vision tower cuts each picture into, by its config;
    None where that does not say."""
    sizes = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    if any(not size for size in sizes):
        return None
    (height, width), (tall, wide) = (
        tuple(s) if isinstance(s, (list, tuple)) else (s, s) for s in sizes
    )
    return int(height) // int(tall), int(width) // int(wide)


def tokens_an_image(config: Any) -> int | None:
    """How many tokens each image has, where that is the same for all (LLaVA-1.5, PaliGemma, Gemma
    3); else None."""
    kind, vision = getattr(config, "model_type", ""), config.vision_config
    if kind == "gemma3":
        return int(config.mm_tokens_per_image)
    if kind in ("llava", "paligemma"):
        rows, columns = grid_of_patches(vision) or (0, 0)
        return rows * columns + (
            getattr(config, "vision_feature_select_strategy", "default") == "full"
        )
    return None


def image_spans(config: Any, input_ids: torch.Tensor) -> list[list[ImageSpan]]:
    """For each sample the spans of image tokens, in order: one an image, or one a piece where text
    divides its pieces (the rows of tiles of Idefics3). Images that touch are told apart where all
    have the same number of tokens.

    Raises `TapError` for a model that takes no images.
    """
    mask = image_mask(config, input_ids)
    if mask is None:
        raise TapError(f"{type(config).__name__} describes a model that takes no images.")
    size = tokens_an_image(config)
    by_row = []
    for row in mask.cpu():
        edges = torch.diff(
            row.int(),
            prepend=torch.zeros(1, dtype=torch.int),
            append=torch.zeros(1, dtype=torch.int),
        )
        runs = zip(
            (edges == 1).nonzero().flatten().tolist(),
            (edges == -1).nonzero().flatten().tolist(),
            strict=True,
        )
        spans: list[ImageSpan] = []
        for start, stop in runs:
            each = size if size and (stop - start) % size == 0 else stop - start
            spans += [ImageSpan(a, a + each) for a in range(start, stop, each)]
        by_row.append(spans)
    return by_row


def ids_and_before(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, int]:
    """(batch, tokens) ids that a model's forward is given, None for embeddings, and how many slots
    its cache holds already."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    length = getattr(kwargs.get("past_key_values"), "get_seq_length", None)
    before = int(length()) if length is not None else 0
    return ids if isinstance(ids, torch.Tensor) else None, before


class ImageWatch:
    """The image tokens of the prompt that a model reads: a forward pre-hook. `mask` (batch, slots)
    bool is None until a prompt was seen, and for prompts given as embeddings."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.mask: torch.Tensor | None = None

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        ids, before = ids_and_before(args, kwargs)
        if ids is None:
            self.mask = self.mask if before else None
            return
        here = image_mask(self.config, ids)
        if before and self.mask is not None and here is not None and len(here) == len(self.mask):
            self.mask = torch.cat([self.mask[:, :before], here], 1)
        else:
            self.mask = here


def image_mark(processor: Any) -> str:
    """What stands for an image in a prompt, as `processor` reads it."""
    token = (
        getattr(processor, "boi_token", None)
        or getattr(processor, "image_token", None)
        or "<image>"
    )
    ends = [getattr(processor, name, None) for name in ("vision_start_token", "vision_end_token")]
    return f"{ends[0]}{token}{ends[1]}" if all(isinstance(end, str) for end in ends) else str(token)


def sample_inputs(config: Any, processor: Any) -> Mapping[str, Any]:
    """A short prompt with one small image, as `processor` makes it, for the check on load."""
    side = 64
    picture = np.linspace(0, 255, side * side * 3).reshape(side, side, 3).astype(np.uint8)
    return processor(images=[picture], text=[f"{image_mark(processor)} a b"], return_tensors="pt")
