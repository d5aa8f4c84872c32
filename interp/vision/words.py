"""Where heads look when a chosen word comes: overlays from the tokens that predict it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import ContextError, InputError
from interp.inputs.tokenizer import stop_tokens
from interp.inputs.words import places, whole_word
from interp.vision.continued import continued
from interp.vision.overlay import View, looks
from interp.vision.prompts import with_images
from interp.vision.reading import read_image
from interp.vision.token_grids import grids_of

if TYPE_CHECKING:
    import torch

    from interp.results.overlay import PictureOverlay
    from interp.vision.pictures import Pictures
    from interp_hooks.heads import Head
    from interp_hooks.model import HookedModel

#: of how many pictures, and how long a caption the model may write, in tokens
PICTURES, CAPTION = 4, 64


def chosen(words: str | Sequence[str]) -> tuple[str, ...]:
    """Words as a list or parted by commas, each once.

    Raises:
        InputError: there is none.

    Example:
        >>> from interp.vision.words import chosen
        >>> chosen("table, chair,table")
        ('table', 'chair')
    """
    parts = words.split(",") if isinstance(words, str) else list(words)
    if any(not isinstance(w, str) for w in parts) or not any(w.strip() for w in parts):
        raise InputError("Name the words that heads look for: --words table,chair, or words=[…].")
    return tuple(dict.fromkeys(w.strip() for w in parts if w.strip()))


def word_overlays(
    model: HookedModel, pictures: Pictures, words: Sequence[str], heads: Sequence[Head]
) -> tuple[list[PictureOverlay], list[str]]:
    """An overlay for each word in each of the first pictures, and what could not be drawn.

    The word is looked for after the picture in the prompt, and where the prompt lacks it in the
    model's own greedy caption, which is then read after the prompt. Weights are those of the token
    before the word's first place, which predicts it. Whole words count, whatever their capitals.

    Args:
        model: a vision-language model.
        pictures: the pictures, with what is asked about them.
        words: the words.
        heads: of the text tower.

    Returns:
        Overlays, picture by picture, and notes.
    """
    overlays: list[PictureOverlay] = []
    notes: list[str] = []
    seen: set[str] = set()
    pairs = pictures.pairs(told=False)[:PICTURES]
    for n, (prompt, source) in enumerate(pairs):
        shown = source.name if isinstance(source, Path) else f"scene {n + 1}"
        try:
            view, rows = _read(model, prompt, source, words)
            made = looks(model, view, heads, list(rows.values())) if rows else []
        except (InputError, ContextError) as reason:
            notes.append(f"words: {shown} is not drawn. {reason}")
            continue
        seen |= set(rows)
        overlays += [
            replace(one, word=word, shown=shown) for word, one in zip(rows, made, strict=True)
        ]
    for word in (w for w in words if w not in seen):
        some = "picture" if len(pairs) == 1 else f"{len(pairs)} pictures"
        notes.append(
            f"words: “{word}” stands neither in the prompt nor in what the model says of the "
            f"{some}, so nothing is drawn for it."
        )
    return overlays, notes


def _read(
    model: HookedModel, prompt: str, source: Any, words: Sequence[str]
) -> tuple[View, dict[str, int]]:
    """A picture in its prompt, with the model's caption where a word needs it; and word → the slot
    of the token before it."""
    picture = read_image(source)
    inputs = with_images(model, prompt, [picture])
    grids, slots = grids_of(model, inputs, prompt, [picture], 0)
    start, length = int(slots.max()) + 1, inputs["input_ids"].shape[1]
    rows = _rows(model, inputs, words, start)
    text = prompt
    if missing := [word for word in words if word not in rows]:
        said = _caption(model, inputs)
        whole = continued(model, inputs, said)
        if more := _rows(model, whole, missing, start, least=length):
            inputs, text = whole, f"{prompt} {model.tokenizer.decode(said).strip()}"
            rows |= more
    ordered = {word: rows[word] for word in words if word in rows}
    return View(inputs, text, picture, grids, slots), ordered


def _rows(
    model: HookedModel, inputs: dict[str, Any], words: Sequence[str], start: int, least: int = 0
) -> dict[str, int]:
    """word → the slot before its first place among the tokens from `start` on, at `least` or
    later."""
    ids = inputs["input_ids"][0, start:].tolist()
    rows = {}
    for word in words:
        found = [start + a for a, b in places(model.tokenizer, ids, whole_word(word))]
        if found := [slot for slot in found if slot >= max(least, 1)]:
            rows[word] = found[0] - 1
    return rows


def _caption(model: HookedModel, inputs: dict[str, torch.Tensor]) -> list[int]:
    """What the model says of the picture, greedily, without what ends it."""
    length, limit = inputs["input_ids"].shape[1], model.max_context
    new = CAPTION if limit is None else min(CAPTION, limit - length)
    if new < 1:
        return []
    with model.clean():
        ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    ends = stop_tokens(model)
    said = ids[0, length:].tolist()
    return said[: next((n for n, token in enumerate(said) if token in ends), len(said))]
