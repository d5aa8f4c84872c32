"""Prompts with images: pictures are read and joined with text by the model's processor, found and
taken out again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError
from interp.vision.reading import read_image
from interp_hooks.errors import TapError
from interp_hooks.huggingface.images import (
    MARKED,
    ImageSpan,
    crosses,
    image_mark,
    image_mask,
    image_spans,
    image_token,
    tokens_an_image,
    tokens_by_image,
    video_token,
)
from interp_hooks.huggingface.images import (
    takes_images as config_takes_images,
)

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

#: What can be taken out of a prompt.
WITHOUT = ("images", "videos", "all")
#: Inputs that have a number a token; those that remain after the image's tokens are taken out.
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def takes_images(model: HookedModel) -> bool:
    """Whether a model has a vision tower and a token for images.

    Args:
        model: the model.

    Example:
        >>> interp.vision.takes_images(model), interp.vision.takes_images(interp.load("llava"))
        (False, True)
    """
    return hasattr(model.module, "config") and config_takes_images(model.module.config)


def needs_images(model: HookedModel, what: str) -> None:
    """Raise `InputError` for a text-only model asked for `what`."""
    if not takes_images(model):
        raise InputError(
            f"{what} needs a vision-language model, and {model.name} takes no images; try --model "
            "llava."
        )


def needs_image_tokens(model: HookedModel, what: str) -> None:
    """Raise `InputError` for a model whose prompts hold no tokens of images, asked for `what`."""
    needs_images(model, what)
    if crosses(model.module.config):
        raise InputError(
            f"{what} needs the image's tokens in the prompt, and {model.name} reads images by "
            "cross-attention beside it."
        )


def reads_text_alone(model: HookedModel, what: str) -> None:
    """Raise `InputError` for a model whose forward must have an image (BLIP-2, Kosmos-2), asked for
    what is compared with the prompt without."""
    parameters = inspect.signature(model.module.forward).parameters
    pixels = parameters.get("pixel_values")
    marked = getattr(model.module.config, "model_type", "") in MARKED
    if marked or (pixels is not None and pixels.default is inspect.Parameter.empty):
        raise InputError(
            f"{what} compares with the prompt without its image, and {model.name} reads no text "
            "alone."
        )


def with_images(
    model: HookedModel, texts: str | Sequence[str], images: Sequence[Any], *, place: bool = True
) -> dict[str, torch.Tensor]:
    """Inputs of a vision-language model: prompts, left-padded, each with its images.

    Args:
        model: a vision-language model.
        texts: a prompt, or several.
        images: pictures, in any form that `read_image` takes; of one prompt its images; of several,
            for each its image or images.
        place: give prompts without marks their images: in the processor's chat template as a user's
            turn, or without one in front of the text; else such prompts are refused.

    Returns:
        What the model's processor makes: input_ids, attention_mask, pixel_values (and more, by
        model).

    Raises:
        InputError: a text-only model, no processor, a prompt without image or image without prompt,
            more images than marks or fewer, a file that can't be read.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> sorted(interp.vision.with_images(model, ["a red circle ?"], [picture]))
        ['attention_mask', 'input_ids', 'pixel_values']
    """
    needs_images(model, "A prompt with images")
    if model.processor is None:
        raise InputError(
            f"{model.name} came without its processor; give it to interp.load as processor=."
        )
    if isinstance(texts, str):
        texts, images = [texts], [list(images)]
    groups = [list(g) if isinstance(g, (list, tuple)) else [g] for g in images]
    if len(groups) != len(texts):
        raise InputError(f"There are {len(texts)} prompts and images for {len(groups)}.")
    mark = image_mark(model.processor)
    token = getattr(model.processor, "image_token", None) or "<image>"
    token = getattr(token, "content", token)
    marked = []
    for text, group in zip(texts, groups, strict=True):
        if not group:
            raise InputError(
                f"The prompt {text!r} has no image; give one with --image, or images=."
            )
        count = max(text.count(mark), text.count(token)) if mark else 0
        if not mark and len(group) > 1:
            raise InputError(
                f"The processor of {model.name} places one image before the text; {len(group)} "
                "were given."
            )
        if mark and not count and not place:
            raise InputError(f"The prompt {text!r} has no {mark}, where its image would stand.")
        if count and count != len(group):
            raise InputError(
                f"The prompt {text!r} has {count} × {mark} and {len(group)} images; it needs one "
                "an image."
            )
        marked.append(text if count else _placed(model, text, len(group), mark))
    pictures = [[read_image(p) for p in group] for group in groups]
    nested = len(texts) > 1 or len(pictures[0]) > 1
    tokenizer = getattr(model.processor, "tokenizer", None)
    side = getattr(tokenizer, "padding_side", None)
    try:
        if tokenizer is not None:
            tokenizer.padding_side = "left"
        tensors = model.processor(
            images=pictures if nested else pictures[0],
            text=marked,
            padding=len(texts) > 1,
            return_tensors="pt",
        )
    except (ValueError, IndexError, TypeError) as error:
        raise InputError(f"The processor of {model.name} refuses these images: {error}") from error
    finally:
        if tokenizer is not None:
            tokenizer.padding_side = side
    return {name: value for name, value in tensors.items() if name != "labels"}


def _placed(model: HookedModel, text: str, images: int, mark: str) -> str:
    """The prompt with its images before it, as a user's turn where the processor has a chat
    template."""
    if not getattr(model.processor, "chat_template", None):
        return f"{mark * images} {text}"
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
    turn = [{"role": "user", "content": content}]
    prompt = str(
        model.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    )
    start = getattr(model.tokenizer, "bos_token", None)
    return prompt.removeprefix(start) if start else prompt  # the processor puts it there itself


def spans(model: HookedModel, input_ids: torch.Tensor | Mapping[str, Any]) -> list[list[ImageSpan]]:
    """The slots of each sample's images and videos, in order.

    See `interp_hooks.huggingface.images.image_spans`. Given all inputs, images of any size that
    touch are told apart; given ids alone, only images of one size are.

    Args:
        model: a vision-language model.
        input_ids: (batch, tokens), or the inputs that hold them.

    Returns:
        For each sample a list of `ImageSpan`s.

    Raises:
        InputError: a text-only model; inputs whose sizes don't fit their tokens, or don't tell
            images that touch.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["a red circle ?"], [picture])
        >>> [len(images) for images in interp.vision.spans(model, inputs)]
        [1]
    """
    needs_image_tokens(model, "Finding image tokens")
    config = model.module.config
    inputs = input_ids if isinstance(input_ids, Mapping) else {}
    ids = inputs["input_ids"] if isinstance(input_ids, Mapping) else input_ids
    try:
        return image_spans(config, ids, inputs, _counts(model, inputs))
    except TapError as error:
        raise InputError(str(error)) from error


def _counts(model: HookedModel, inputs: Mapping[str, Any]) -> list[int] | None:
    """Tokens of each image by the processor's own count, from their sizes (LLaVA-NeXT and its
    like); None where that is not known, or inputs say it themselves."""
    config, sizes = model.module.config, inputs.get("image_sizes")
    count = getattr(model.processor, "_get_num_multimodal_tokens", None)
    told = tokens_by_image(config, inputs) is not None or tokens_an_image(config) is not None
    if sizes is None or count is None or told:
        return None
    try:
        counts = list(count(image_sizes=[tuple(s) for s in sizes.tolist()])["num_image_tokens"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return (
        counts if sum(counts) == int((inputs["input_ids"] == image_token(config)).sum()) else None
    )


def own_positions(model: HookedModel) -> dict[str, Any]:
    """What to add to a forward's inputs so that the model counts its positions itself: those of
    rotary sections (time, height, width) come from the image and can't be told from the mask alone.
    Empty for other models."""
    return dict(position_ids=None) if has_sections(model) else {}


def has_sections(model: HookedModel) -> bool:
    """Whether image tokens stand at positions of several dimensions (Qwen-VL's M-RoPE)."""
    text = model.module.config.get_text_config()
    ropes = (getattr(text, name, None) for name in ("rope_parameters", "rope_scaling"))
    return any(isinstance(rope, Mapping) and "mrope_section" in rope for rope in ropes)


def checked(
    model: HookedModel, inputs: Mapping[str, Any], what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of prompts with images, on the model's device. Raises
    `InputError` for a text-only model, prompts without image, right padding; `what` says who needs
    them."""
    needs_image_tokens(model, what)
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise InputError(
            f"{what} needs input_ids (batch, tokens); interp.vision.with_images makes them."
        )
    image = image_mask(model.module.config, ids, inputs)
    if image is None or not bool(image.any()):
        raise InputError(f"{what} needs a prompt with an image, and this one has none.")
    if missing := _missing(model, inputs, ids):
        raise InputError(
            f"{what} needs the {missing[0]} itself ({missing[1]}) beside the tokens that stand for "
            "it."
        )
    attention_mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
    if not bool(mask[:, -1].all()):
        raise InputError(
            f"{what} reads the last token of each prompt, which is padding here; pad on the left."
        )
    return ids.to(model.device), mask.to(model.device)


def _missing(
    model: HookedModel, inputs: Mapping[str, Any], ids: torch.Tensor
) -> tuple[str, str] | None:
    """What stands in the ids and not among the inputs: ("image", "pixel_values"), ("video", …)."""
    config = model.module.config
    given = {name for name, value in inputs.items() if value is not None}
    pixels = {name for name in given if name.startswith("pixel_values")}
    video = video_token(config)
    if video is not None and bool((ids == video).any()) and not any("video" in n for n in pixels):
        return "video", "pixel_values_videos"
    # frames of videos may have the token of images (GLM-4V, InternVL)
    image = image_token(config)
    if not pixels and image is not None and bool((ids == image).any()):
        return "image", "pixel_values"
    return None


def _masks(
    model: HookedModel, inputs: Mapping[str, Any], which: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, videos), each (batch, tokens) bool. Frames that have the token of images are told by
    mm_token_type_ids; `InputError` where one kind is asked for and that is not there."""
    config, ids = model.module.config, inputs["input_ids"]
    mask = image_mask(config, ids, inputs)
    if mask is None:
        mask = torch.zeros_like(ids, dtype=torch.bool)
    video, kinds = video_token(config), inputs.get("mm_token_type_ids")
    videos = torch.zeros_like(mask) if video is None else mask & (ids == video)
    has_videos = any("video" in n for n, v in inputs.items() if v is not None)
    if has_videos and not bool(videos.any()):
        if kinds is not None:
            videos = mask & (kinds.to(ids.device) == 2)
        elif "pixel_values" not in inputs:
            videos = mask
        elif which != "all":
            raise InputError(
                f"Frames of videos and images have the same token in {model.name}, so one kind "
                'can\'t be taken out alone; give mm_token_type_ids, or take out "all".'
            )
    return mask & ~videos, videos


def to_take_out(model: HookedModel, inputs: Mapping[str, Any], without: str | None) -> str:
    """Which pictures a comparison takes out: what it is told, or all of the one kind there is.
    Raises `InputError` for prompts with images and videos and no word which, and unknown words."""
    if without is None:
        images, videos = _masks(model, inputs, "all")
        if bool(images.any()) and bool(videos.any()):
            raise InputError(
                "This prompt holds images and videos, and a comparison with the prompt without "
                'them can be with either: give without="images", "videos" or "all".'
            )
        return "all"
    if without not in WITHOUT:
        raise InputError(f"What is taken out is {', '.join(WITHOUT)}, not {without!r}.")
    return without


def without_images(
    model: HookedModel, inputs: Mapping[str, Any], which: str = "all"
) -> dict[str, torch.Tensor]:
    """The same prompts with the tokens of images and videos taken out, not blanked.

    Words (and sounds) around them stay; what is shorter then is left-padded.

    Args:
        model: a vision-language model.
        inputs: as `with_images` makes them.
        which: "all" pictures, or "images" or "videos" alone.

    Returns:
        input_ids and attention_mask (and what else is there for each token, for sounds, and for the
        pictures that stay).

    Raises:
        InputError: there is none of these in them.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["a red circle ?"], [picture])
        >>> bare = interp.vision.without_images(model, inputs)
        >>> bare["input_ids"].shape[1] < inputs["input_ids"].shape[1]
        True
    """
    ids = inputs["input_ids"]
    which = to_take_out(model, inputs, which)
    images, videos = _masks(model, inputs, which)
    out = dict(all=images | videos, images=images, videos=videos)[which]
    if not bool(out.any()):
        kind = "video" if which == "videos" else "image"
        raise InputError(f"There is no {kind} in this prompt, so none can be taken out.")
    real = inputs.get("attention_mask")
    text = ~out if real is None else ~out & real.bool()
    width = int(text.sum(1).max())
    tensors: dict[str, torch.Tensor] = {
        n: v for n, v in inputs.items() if n not in PER_TOKEN and _stays(n, which)
    }
    for name in PER_TOKEN:
        value = inputs.get(name)
        if value is None:
            continue
        rows = value.new_zeros(len(value), width)
        for row in range(len(value)):
            words = value[row][text[row]]
            rows[row, width - len(words) :] = words
        tensors[name] = rows
    if "attention_mask" not in tensors:
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
        for row in range(len(ids)):
            tensors["attention_mask"][row, : width - int(text[row].sum())] = 0
    return tensors


def _stays(name: str, which: str) -> bool:
    """Whether an input that is no number a token stays: those of sounds, and of the pictures that
    are not taken out."""
    if "audio" in name or name in ("input_features", "feature_attention_mask", "input_values"):
        return True
    if which == "all" or name in ("position_ids", "cache_position", "rope_deltas"):
        return False
    of_videos = "video" in name or name == "second_per_grid_ts"
    return of_videos == (which == "images")
