"""Where heads look: one token's attention laid over the picture, head by head, its sinks marked."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interp.errors import InputError
from interp.results.overlay import Overlay
from interp_hooks.heads import Head, parse_heads

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from interp_hooks.model import HookedModel

#: pictures are stored with at most this many pixels a side
_STORED = 512


def grid_of(model: HookedModel, inputs: Mapping[str, torch.Tensor], tokens: int) -> tuple[int, int]:
    """Rows and columns of an image's `tokens` tokens. Raises `InputError` where they are no grid of
    one picture."""
    grids = inputs.get("image_grid_thw")
    if grids is not None:  # Qwen-VL: of the picture's own shape, merged
        vision = model.module.config.vision_config
        merge = int(getattr(vision, "spatial_merge_size", 1))
        for _, rows, columns in grids.tolist():
            if rows * columns == tokens * merge**2:
                return rows // merge, columns // merge
    side = round(tokens**0.5)
    if side * side != tokens:
        raise InputError(
            f"The {tokens} tokens of this image of {model.name} are no square grid (tiles, or rows "
            "of any length), so "
            "their weights can't be laid over it."
        )
    return side, side


def overlay(
    model: HookedModel,
    picture: Any,
    prompt: str,
    heads: str | Iterable[str | Sequence[int] | Head],
    token: int = -1,
) -> Overlay:
    """The attention of heads on a picture, from one token of the prompt, with the visual sinks.

    Heads are those of the text tower. Visual sinks are image tokens whose stream there has φ(x) =
    max_{d in D} |x[d]| / RMS(x) ≥ τ, D the dimensions published for the model, or those of its
    first token's massive activations (as the score `visual_sink`).

    Args:
        model: a vision-language model.
        picture: a picture, or its file.
        prompt: the prompt; its image is placed as in `with_images`.
        heads: the heads, in any spelling.
        token: position in the prompt, counted from the end where negative.

    Returns:
        An `Overlay`: weights by head and patch; it is drawn in reports and saved with an atlas.

    Raises:
        InputError: a text-only model, no such token, image tokens that are no grid.
        HeadError: no such head.

    Example:
        >>> from PIL import Image
        >>> vlm = interp.load("llava")
        >>> seen = interp.vision.overlay(vlm, Image.new("RGB", (56, 56)), "a red circle ?", "L2H0")
        >>> list(seen.maps)
        ['text.L2H0']
    """
    import torch

    from interp.vision.prompts import needs_images, spans, with_images
    from interp.vision.reading import read_image
    from interp.vision.sinks import find_sinks
    from interp_kernels import Received

    needs_images(model, "An overlay of attention")
    shown = read_image(picture)
    targets = [model.check(h) for h in parse_heads(heads)]
    targets = [h if h.tower else Head(h.layer, h.head, model.main_tower) for h in targets]
    if any(h.tower != model.main_tower for h in targets):
        raise InputError(
            "An overlay shows heads of the text tower, which look at the image's tokens."
        )
    inputs = with_images(model, prompt, [shown])
    ids = inputs["input_ids"]
    first = inputs.get("attention_mask", torch.ones_like(ids)).int().argmax(1)  # first real token
    if not -ids.shape[1] <= token < ids.shape[1]:
        raise InputError(f"There is no token {token} in a prompt of {ids.shape[1]} tokens.")
    (span, *_), = spans(model, ids)  # fmt: skip
    size = grid_of(model, inputs, span.stop - span.start)
    rows = torch.zeros_like(ids, dtype=torch.bool)
    rows[0, token] = True
    # What a key receives from one query alone is that query's weight on it.
    question = dict(row=Received(queries=rows, reduce="sum"))
    with (
        torch.no_grad(),
        model.clean(),
        model.capture_resid() as stream,
        model.observe(received=question) as recording,
    ):
        model(**inputs)
    maps, mass, sinks = {}, {}, {}
    for head in targets:
        record = recording[model.main_tower, head.layer]
        weights = record.received_by("row")[0, head.head, span.start : span.stop].cpu()
        maps[str(head)] = [[float(w) for w in line] for line in weights.view(size)]
        mass[str(head)] = float(weights.sum())
        marked = find_sinks(model, stream["pre", head.layer], first)[0][0, span.start : span.stop]
        sinks[str(head)] = [
            (int(i) // size[1], int(i) % size[1]) for i in marked.nonzero().flatten()
        ]
    word = model.tokenizer.decode(ids[0, token : token + 1 or None]).strip()
    return Overlay(_png(shown), prompt, word, maps, mass, sinks)


def _png(picture: Image) -> str:
    small = picture.copy()
    small.thumbnail((_STORED, _STORED))
    file = io.BytesIO()
    small.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
