"""Where heads look: one token's attention laid over the picture, head by head, its sinks marked."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from interp.errors import InputError
from interp.results.overlay import WHOLE, Overlay, TiledOverlay
from interp.vision.prompts import needs_image_tokens, with_images
from interp.vision.reading import read_image
from interp.vision.token_grids import TokenGrid, grids_of
from interp_hooks.heads import Head, parse_heads

if TYPE_CHECKING:
    import torch
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
    image: int = 0,
) -> Overlay | TiledOverlay:
    """The attention of heads on a picture, from one token of the prompt, with the visual sinks.

    Heads are those of the text tower. Visual sinks are image tokens whose stream there has φ(x) =
    max_{d in D} |x[d]| / RMS(x) ≥ τ, D the dimensions published for the model, or those of its
    first token's massive activations (as the score `visual_sink`).

    Args:
        model: a vision-language model.
        picture: a picture, or its file; or a list of those of a prompt with several (frames too).
        prompt: the prompt; its images are placed as in `with_images`.
        heads: the heads, in any spelling.
        token: position in the prompt, counted from the end where negative.
        image: which of several pictures is drawn, counted from 0, or from the end where negative.

    Returns:
        An `Overlay`: weights by head and patch, each where its patch is in the picture; it is drawn
        in reports and saved with an atlas. A `TiledOverlay` where the model reads the picture as
        several grids (tiles, a small copy of the whole).

    Raises:
        InputError: a text-only model, no such token or picture, image tokens that lie nowhere in
            the picture (resampled) or not known where.
        HeadError: no such head.

    Example:
        >>> from PIL import Image
        >>> vlm = interp.load("llava")
        >>> seen = interp.vision.overlay(vlm, Image.new("RGB", (56, 56)), "a red circle ?", "L2H0")
        >>> list(seen.maps)
        ['text.L2H0']
    """
    needs_image_tokens(model, "An overlay of attention")
    pictures = [read_image(p) for p in (picture if isinstance(picture, list) else [picture])]
    if not -len(pictures) <= image < len(pictures):
        raise InputError(f"There is no picture {image} among {len(pictures)}; the first is 0.")
    targets = text_heads(model, heads)
    inputs = with_images(model, prompt, pictures)
    length = inputs["input_ids"].shape[1]
    if not -length <= token < length:
        raise InputError(f"There is no token {token} in a prompt of {length} tokens.")
    k = image % len(pictures)
    grids, slots = grids_of(model, inputs, prompt, pictures, k)
    (made,) = looks(model, View(inputs, prompt, pictures[k], grids, slots), targets, [token])
    return made


def text_heads(model: HookedModel, heads: str | Iterable[str | Sequence[int] | Head]) -> list[Head]:
    """The heads that are meant, of the text tower. Raises `HeadError`, `InputError`."""
    targets = [model.check(h) for h in parse_heads(heads)]
    targets = [h if h.tower else Head(h.layer, h.head, model.main_tower) for h in targets]
    if any(h.tower != model.main_tower for h in targets):
        raise InputError(
            "An overlay shows heads of the text tower, which look at the image's tokens."
        )
    return targets


class View(NamedTuple):
    """A picture in a prompt: what the model is given, the text as it is shown, the grids on which
    the picture's tokens lie, and the slots of all of them."""

    inputs: dict[str, Any]
    text: str
    picture: Image
    grids: list[TokenGrid]
    slots: torch.Tensor


def looks(
    model: HookedModel, view: View, heads: Sequence[Head], tokens: Sequence[int]
) -> list[Overlay | TiledOverlay]:
    """An overlay from each of these tokens, by one forward."""
    import torch

    from interp.vision.sinks import find_sinks
    from interp_hooks.huggingface.images import image_mask
    from interp_kernels import Received

    inputs, ids = view.inputs, view.inputs["input_ids"]
    real = inputs.get("attention_mask")
    first = (torch.ones_like(ids) if real is None else real).int().argmax(1)  # first real token
    image = image_mask(model.module.config, ids, inputs)
    received = {}
    for n, token in enumerate(tokens):
        rows = torch.zeros_like(ids, dtype=torch.bool)
        rows[0, token] = True
        # What a key receives from one query alone is that query's weight on it.
        received[f"row-{n}"] = Received(queries=rows, reduce="sum")
    with (
        torch.no_grad(),
        model.clean(),
        model.capture_resid() as stream,
        model.observe(received=received) as recording,
    ):
        model(**inputs)
    sinks = {
        str(head): find_sinks(model, stream["pre", head.layer], first, real, image)[0][0].cpu()
        for head in heads
    }
    weights = [
        {
            str(head): recording[model.main_tower, head.layer].received_by(f"row-{n}")[0, head.head]
            for head in heads
        }
        for n in range(len(tokens))
    ]
    words = [model.tokenizer.decode(ids[0, t : t + 1 or None]).strip() for t in tokens]
    return [
        _laid(view, word, {head: row.cpu() for head, row in rows.items()}, sinks, int(first[0]))
        for word, rows in zip(words, weights, strict=True)
    ]


def _laid(
    view: View,
    word: str,
    weights: dict[str, torch.Tensor],
    sinks: dict[str, torch.Tensor],
    first: int,
) -> Overlay | TiledOverlay:
    """One token's rows of weights, head → (keys,), where the picture's patches lie."""
    grids, picture = view.grids, _png(view.picture)
    maps = {head: [row[grid.slots].tolist() for grid in grids] for head, row in weights.items()}
    # of all its tokens, those at no place too
    mass = {head: float(row[view.slots].sum()) for head, row in weights.items()}
    at_first = {head: float(row[first]) for head, row in weights.items()}
    marked = {
        head: [
            (n, int(r), int(c))
            for n, grid in enumerate(grids)
            for r, c in found[grid.slots].nonzero().tolist()
        ]
        for head, found in sinks.items()
    }
    if len(grids) > 1:
        boxes = [grid.box for grid in grids]
        return TiledOverlay(picture, view.text, word, boxes, maps, mass, marked, at_first)
    near = all(abs(a - b) < EXACT for a, b in zip(grids[0].box, WHOLE, strict=True))
    return Overlay(
        picture,
        view.text,
        word,
        {head: one for head, (one,) in maps.items()},
        mass,
        {head: [(r, c) for _, r, c in found] for head, found in marked.items()},
        WHOLE if near else grids[0].box,
        at_first,
    )


def _png(picture: Image) -> str:
    small = picture.copy()
    small.thumbnail((_STORED, _STORED))
    file = io.BytesIO()
    small.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
