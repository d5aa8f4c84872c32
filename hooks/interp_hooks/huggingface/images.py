"""Which tokens of a vision-language model's prompt are the pictures': of images and videos."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from interp_hooks.errors import TapError


class ImageSpan(NamedTuple):
    """Slots start … stop − 1 of the padded sequence hold tokens of an image or a video."""

    start: int
    stop: int


#: what configs call the token that stands for a piece of an image, or of a video
_IMAGE = ("image_token_id", "image_token_index")
_VIDEO = ("video_token_id", "video_token_index")


def _token(config: Any, names: tuple[str, ...]) -> int | None:
    """The id under one of these names, in the config, that of the part that reads (omni models), or
    of the vision tower (Phi-4)."""
    for part in (config, getattr(config, "thinker_config", None)):
        vision = getattr(part, "vision_config", None)
        if vision is None and getattr(part, "vq_config", None) is None:
            continue
        for place in (part, vision):
            for name in names:
                token = getattr(place, name, None)
                if isinstance(token, int):
                    return token
    return None


def image_token(config: Any) -> int | None:
    """The id of the token that stands for a piece of an image, None for models that take none."""
    return _token(config, _IMAGE)


def video_token(config: Any) -> int | None:
    """The id of the token that stands for a piece of a video; None where there is none of its own
    (no videos, or their frames have the token of images)."""
    return _token(config, _VIDEO)


#: model types whose inputs say which tokens are the image's, and what that input is called
MARKED = {"kosmos-2": "image_embeds_position_mask", "kosmos-2.5": "image_embeds_position_mask"}


def takes_images(config: Any) -> bool:
    """Whether a model of this config reads images."""
    return image_token(config) is not None or getattr(config, "model_type", "") in MARKED


def sees_alone(module: Any, accepts: Container[str]) -> bool:
    """Whether a model's main input is a picture and it reads no text beside it (ViT, the vision
    half of CLIP, DINOv2). `accepts`: the arguments of its forward."""
    reads = any(name in accepts for name in ("input_ids", "decoder_input_ids"))
    return getattr(module, "main_input_name", "") == "pixel_values" and not reads


def crosses(config: Any) -> bool:
    """Whether a model reads images by cross-attention (Mllama): no token of its prompt is one's."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "cross_attention_layers", None))


def image_mask(
    config: Any, input_ids: torch.Tensor, inputs: Mapping[str, Any] | None = None
) -> torch.Tensor | None:
    """(batch, slots) bool: the tokens of images and videos; None for models that take no images.
    Tokens of sounds are none of them. `inputs`: those beside the ids, which in some models hold the
    mask (Kosmos-2)."""
    if crosses(config):
        return torch.zeros_like(input_ids, dtype=torch.bool)
    name = MARKED.get(getattr(config, "model_type", ""))
    if name is not None:
        mask = (inputs or {}).get(name)
        if mask is None or mask.shape != input_ids.shape:  # a decode step has words alone
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return mask.bool()
    tokens = [t for t in (image_token(config), video_token(config)) if t is not None]
    if not tokens:
        return None
    return torch.isin(input_ids, torch.tensor(tokens, device=input_ids.device))


def grid_of_patches(vision: Any, pixels: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Rows and columns of the patches that a vision tower cuts each picture into, by its config;
    None where that does not say. `pixels`: height and width of the pictures where they are
    known."""
    sizes = [pixels or getattr(vision, "image_size", None), getattr(vision, "patch_size", None)]
    if any(not size for size in sizes):
        return None
    (height, width), (tall, wide) = (
        tuple(s) if isinstance(s, (list, tuple)) else (s, s) for s in sizes
    )
    return int(height) // int(tall), int(width) // int(wide)


def tokens_before(vision: Any) -> int:
    """How many tokens stand before a vision tower's patches, where there is a class token at all:
    that, registers (DINOv2, DINOv3), and DeiT's for distillation."""
    distilled = getattr(vision, "model_type", "") == "deit"
    return 1 + int(getattr(vision, "num_register_tokens", None) or 0) + distilled


def class_tokens(vision: Any) -> int:
    """How many tokens stand before a vision tower's patches: 1, or 0 in the SigLIP family."""
    kind = str(getattr(vision, "model_type", ""))
    return 0 if any(name in kind for name in ("siglip", "pixtral")) else 1


def tokens_an_image(config: Any) -> int | None:
    """How many tokens each image (or piece of one) has, where that is the same for all (LLaVA-1.5,
    PaliGemma, Gemma 3, and models that resample); else None."""
    kind, vision = getattr(config, "model_type", ""), getattr(config, "vision_config", None)
    if kind == "gemma3":
        return int(config.mm_tokens_per_image)
    if kind in ("llava", "vipllava"):  # "default" drops the first token, whatever it is
        rows, columns = grid_of_patches(vision) or (0, 0)
        full = getattr(config, "vision_feature_select_strategy", "default") == "full"
        return rows * columns + class_tokens(vision) - (not full) or None
    if kind == "paligemma":
        rows, columns = grid_of_patches(vision) or (0, 0)
        return rows * columns or None
    queries = getattr(config, "num_query_tokens", None)  # BLIP-2, InstructBLIP
    return int(queries) if queries else None


def tokens_by_image(
    config: Any, inputs: Mapping[str, Any], video: bool = False
) -> list[int] | None:
    """How many tokens each image (or video) of the inputs has, in order, where grids or sizes among
    them say so; else None."""
    vision = getattr(config, "vision_config", None)
    what = "video" if video else "image"
    grids = inputs.get(f"{what}_grid_thw")
    if grids is not None:
        merges = inputs.get(f"{what}_merge_sizes")
        merge = getattr(vision, "spatial_merge_size", None) or 1
        sizes = torch.full((len(grids),), int(merge)) if merges is None else merges.cpu()
        return [int(g.prod()) // int(m) ** 2 for g, m in zip(grids.cpu(), sizes, strict=True)]
    if not video and class_tokens(vision) == 0 and inputs.get("image_sizes") is not None:
        patch = getattr(vision, "patch_size", None)
        if "pixtral" in str(getattr(vision, "model_type", "")) and patch:
            step = int(patch) * int(getattr(config, "spatial_merge_size", 1))
            return [(int(h) // step) * (int(w) // step) for h, w in inputs["image_sizes"].tolist()]
    return None


def image_spans(
    config: Any,
    input_ids: torch.Tensor,
    inputs: Mapping[str, Any] | None = None,
    counts: list[int] | None = None,
) -> list[list[ImageSpan]]:
    """For each sample the spans of tokens of images and videos, in order: one an image, or one a
    piece where text divides its pieces (the rows of tiles of Idefics3).

    Images that touch are told apart where all have the same number of tokens, or by what `inputs`
    (those of the model beside the ids: grids, sizes) or `counts` (tokens of each image of the batch
    in order) say. Without either, images of models that take any size stand as one span where they
    touch.

    Raises `TapError` for a model that takes no images, and where sizes and tokens don't fit.
    """
    mask = image_mask(config, input_ids, inputs)
    if mask is None:
        raise TapError(f"{type(config).__name__} describes a model that takes no images.")
    if image_token(config) is None or crosses(config):
        return [[ImageSpan(*run) for run in _runs(row)] for row in mask.cpu()]
    by_row: list[list[ImageSpan]] = [[] for _ in input_ids]
    for token, video in ((image_token(config), False), (video_token(config), True)):
        if token is None:
            continue
        sizes = tokens_by_image(config, inputs or {}, video)
        sizes = counts if sizes is None and not video else sizes
        _check_pictures(config, input_ids == token, inputs or {}, sizes, video)
        cutter = _Cutter(sizes, None if video else tokens_an_image(config))
        for row, mine in zip((input_ids == token).cpu(), by_row, strict=True):
            mine += [span for start, stop in _runs(row) for span in cutter.cut(start, stop)]
        if sizes is not None and cutter.left():
            what = "video" if video else "image"
            raise TapError(
                f"The prompts hold {int((input_ids == token).sum())} {what} tokens, and their "
                f"{what}s have {sum(sizes)}."
            )
    return [sorted(spans) for spans in by_row]


def _runs(row: torch.Tensor) -> list[tuple[int, int]]:
    """(start, stop) of each run of True."""
    edge = torch.zeros(1, dtype=torch.int)
    edges = torch.diff(row.int(), prepend=edge, append=edge)
    starts, stops = ((edges == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return list(zip(starts, stops, strict=True))


def _check_pictures(
    config: Any, mask: torch.Tensor, inputs: Mapping[str, Any], sizes: Any, video: bool
) -> None:
    """Raise `TapError` where inputs of several images of any size say not where each ends: fewer
    runs of tokens than images, and no sizes."""
    images = inputs.get("image_sizes")
    if video or sizes is not None or images is None or tokens_an_image(config) is not None:
        return
    runs = sum(len(_runs(row)) for row in mask.cpu())
    if runs < len(images):
        raise TapError(
            f"{len(images)} images of this prompt touch ({runs} runs of image tokens), and where "
            "each ends is not said; put a word between them."
        )


class _Cutter:
    """Cuts runs of image tokens into spans: by the sizes of the images in order, by one size of
    all, or not at all."""

    def __init__(self, sizes: list[int] | None, each: int | None) -> None:
        self.sizes = None if sizes is None else [n for n in sizes if n]
        self.each = each

    def left(self) -> bool:
        return bool(self.sizes)

    def cut(self, start: int, stop: int) -> list[ImageSpan]:
        if self.sizes is None:
            n = stop - start
            each = self.each if self.each and n % self.each == 0 else n
            return [ImageSpan(a, a + each) for a in range(start, stop, each)]
        spans: list[ImageSpan] = []
        while start < stop:
            if not self.sizes:
                raise TapError("The prompts hold more image tokens than their images have.")
            size = min(self.sizes[0], stop - start)  # the rest of a divided image is in a next run
            self.sizes[0] -= size
            if not self.sizes[0]:
                self.sizes.pop(0)
            spans.append(ImageSpan(start, start + size))
            start += size
        return spans


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
        here = image_mask(self.config, ids, kwargs)
        if before and self.mask is not None and here is not None and len(here) == len(self.mask):
            self.mask = torch.cat([self.mask[:, :before], here], 1)
        else:
            self.mask = here


def image_mark(processor: Any) -> str:
    """What stands for an image in a prompt, as `processor` reads it; "" where it places images
    itself, before the text (BLIP-2, Kosmos-2)."""
    itself = ("num_query_tokens", "num_patch_index_tokens")
    if any(getattr(processor, name, None) is not None for name in itself):
        return ""
    token = (
        getattr(processor, "boi_token", None)
        or getattr(processor, "image_token", None)
        or "<image>"
    )
    token = getattr(token, "content", token)
    ends = [getattr(processor, name, None) for name in ("vision_start_token", "vision_end_token")]
    return f"{ends[0]}{token}{ends[1]}" if all(isinstance(end, str) for end in ends) else str(token)


def sample_inputs(config: Any, processor: Any) -> Mapping[str, Any]:
    """A short prompt with one small image, as `processor` makes it, for the check on load."""
    from PIL import Image

    side = 64
    pixels = np.linspace(0, 255, side * side * 3).reshape(side, side, 3).astype(np.uint8)
    picture = Image.fromarray(pixels)
    return processor(images=[picture], text=[f"{image_mark(processor)} a b"], return_tensors="pt")
