"""Where heads look: one token's attention laid over the picture, head by head, its sinks marked."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from interp.errors import InputError
from interp.results.overlay import WHOLE, Overlay, TiledOverlay
from interp_hooks.heads import Head, parse_heads

if TYPE_CHECKING:
    from PIL.Image import Image

    from interp_hooks.model import HookedModel

#: pictures are stored with at most this many pixels a side
_STORED = 512
#: a grid's edges are those of the picture where they are so near (a picture has 256 levels)
EXACT = 0.005


def overlay(
    model: HookedModel,
    picture: Any,
    prompt: str,
    heads: str | Iterable[str | Sequence[int] | Head],
    token: int = -1,
) -> Overlay | TiledOverlay:
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
        An `Overlay`: weights by head and patch, each where its patch is in the picture; it is drawn
        in reports and saved with an atlas. A `TiledOverlay` where the model reads the picture as
        several grids (tiles, a small copy of the whole).

    Raises:
        InputError: a text-only model, no such token, image tokens that lie nowhere in the picture
            (resampled) or not known where.
        HeadError: no such head.

    Example:
        >>> from PIL import Image
        >>> vlm = interp.load("llava")
        >>> seen = interp.vision.overlay(vlm, Image.new("RGB", (56, 56)), "a red circle ?", "L2H0")
        >>> list(seen.maps)
        ['text.L2H0']
    """
    import torch

    from interp.vision.prompts import needs_image_tokens, with_images
    from interp.vision.reading import read_image
    from interp.vision.sinks import find_sinks
    from interp.vision.token_grids import token_grids
    from interp_hooks.huggingface.images import image_mask
    from interp_kernels import Received

    needs_image_tokens(model, "An overlay of attention")
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
    grids = token_grids(model, inputs, prompt, shown)
    image = image_mask(model.module.config, ids, inputs)
    assert image is not None
    real = inputs.get("attention_mask")
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
    weights: dict[str, list[list[list[float]]]] = {}
    mass: dict[str, float] = {}
    sinks: dict[str, list[tuple[int, int, int]]] = {}
    for head in targets:
        record = recording[model.main_tower, head.layer]
        row = record.received_by("row")[0, head.head].cpu()
        weights[str(head)] = [row[grid.slots].tolist() for grid in grids]
        mass[str(head)] = float(row[image[0]].sum())  # of all its tokens, those at no place too
        marked = find_sinks(model, stream["pre", head.layer], first, real, image)[0][0].cpu()
        sinks[str(head)] = [
            (n, int(r), int(c))
            for n, grid in enumerate(grids)
            for r, c in marked[grid.slots].nonzero().tolist()
        ]
    word = model.tokenizer.decode(ids[0, token : token + 1 or None]).strip()
    if len(grids) > 1:
        boxes = [grid.box for grid in grids]
        return TiledOverlay(_png(shown), prompt, word, boxes, weights, mass, sinks)
    near = all(abs(a - b) < EXACT for a, b in zip(grids[0].box, WHOLE, strict=True))
    return Overlay(
        _png(shown),
        prompt,
        word,
        {head: one for head, (one,) in weights.items()},
        mass,
        {head: [(r, c) for _, r, c in marked] for head, marked in sinks.items()},
        WHOLE if near else grids[0].box,
    )


def _png(picture: Image) -> str:
    small = picture.copy()
    small.thumbnail((_STORED, _STORED))
    file = io.BytesIO()
    small.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
