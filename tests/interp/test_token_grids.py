"""Each image token lies where a mark in the picture changes it: for every family and several shapes
of picture, by the embeddings of a model whose vision tower does not mix its patches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from interp import vision
from interp.edits import ScaleHeads
from interp.errors import InputError
from interp.results.overlay import Overlay, PictureOverlay, TiledOverlay
from interp.vision.overlay import overlay
from interp.vision.token_grids import TokenGrid, token_grids
from interp_hooks import HookedModel, hook
from interp_hooks.conformance import vlm

PLACED = ["llava", "llava_siglip", "llava_next", "llava_onevision", "pixtral", "mistral3",
          "aya_vision", "internvl", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
          "glm4v", "gemma3", "paligemma", "llama4"]  # fmt: skip
SIZES = [(96, 48), *(pytest.param(s, marks=pytest.mark.slow) for s in ((64, 64), (40, 120)))]


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> HookedModel:
    made = vlm.build(request.param)
    return hook(made.module, name=request.param, processor=made.processor)


def pixels(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(90, 160, (height, width, 3), dtype=np.uint8)


def entering(model: HookedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """(tokens, d_model) that enter the text tower, the heads of the vision tower silent, so that
    patches stay apart."""
    found: list[torch.Tensor] = []
    first = min((s for s in model.sites if s.is_main), key=lambda s: s.layer)
    block = model.module.get_submodule(first.path.rpartition(".")[0])

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    silent = {str(h): 0.0 for h in model.heads if h.tower == "vision"}
    try:
        with torch.no_grad(), model.edit(ScaleHeads(silent)):
            model(**inputs)
    finally:
        handle.remove()
    return found[0][0]


def cells(grids: list[TokenGrid]) -> Iterator[tuple[int, tuple[float, float, float, float], tuple]]:
    """(slot, its rectangle, the size of a pixel of its tile) in shares of the picture."""
    for grid in grids:
        left, top, right, bottom = grid.box
        rows, columns = grid.slots.shape
        for r in range(rows):
            for c in range(columns):
                x, y = (right - left) / columns, (bottom - top) / rows
                at = left + c * x, top + r * y, left + (c + 1) * x, top + (r + 1) * y
                yield int(grid.slots[r, c]), at, (x / 4, y / 4)  # tokens are 4 pixels or more


@pytest.mark.parametrize("model", PLACED, indirect=True)
@pytest.mark.parametrize("size", SIZES)
def test_a_mark_changes_the_tokens_that_lie_on_it(
    model: HookedModel, size: tuple[int, int]
) -> None:
    width, height = size
    plain = pixels(width, height)
    inputs = vision.with_images(model, vlm.PROMPT, [plain])
    grids = token_grids(model, inputs, vlm.PROMPT, Image.fromarray(plain))
    before = entering(model, inputs)
    slots = [slot for slot, _, _ in cells(grids)]
    assert len(slots) == len(set(slots))
    placed = dict.fromkeys(slots, False)
    for left, top in ((0.0, 0.0), (0.3, 0.6), (0.7, 0.1), (0.6, 0.65)):
        mark = (left, top, left + 0.3, top + 0.35)
        marked = plain.copy()
        box = (np.array(mark) * [width, height, width, height]).round().astype(int)
        marked[box[1] : box[3], box[0] : box[2]] = 255 - 80 * (
            marked[box[1] : box[3], box[0] : box[2]] > 120
        )
        after = entering(model, vision.with_images(model, vlm.PROMPT, [marked]))
        changed = (before - after).abs().amax(-1) > 1e-4
        for slot, (x0, y0, x1, y1), (px, py) in cells(grids):
            wide = min(x1, mark[2]) - max(x0, mark[0])
            tall = min(y1, mark[3]) - max(y0, mark[1])
            if wide > 0.35 * (x1 - x0) and tall > 0.35 * (y1 - y0):
                assert bool(changed[slot]), (slot, mark)
                placed[slot] = True
            # a resized pixel mixes with its neighbours, three at most
            if max(x0 - mark[2], mark[0] - x1) > 3 * px or max(y0 - mark[3], mark[1] - y1) > 3 * py:
                assert not bool(changed[slot]), (slot, mark)
        others = [k for k in range(len(changed)) if k not in placed]
        assert not bool(changed[others].any())
    assert any(placed.values())


@pytest.mark.parametrize("model", PLACED, indirect=True)
def test_the_mass_is_that_of_all_image_tokens(model: HookedModel) -> None:
    """From the untapped model's own eager weights; the grids hold the weights of their tokens."""
    picture = Image.fromarray(pixels(96, 48))
    made = overlay(model, picture, vlm.PROMPT, "L1H2")
    (name,) = made.heads
    inputs = vision.with_images(model, vlm.PROMPT, [picture])
    module = model.module
    module.set_attn_implementation("eager")
    path = next(s.path for s in model.sites if s.is_main and s.layer == 1)
    seen: list[torch.Tensor] = []

    def note(m: Any, a: Any, out: Any) -> None:
        seen.append(out[1])

    handle = module.get_submodule(path).register_forward_hook(note)
    with torch.no_grad():
        module(**inputs, output_attentions=True)
    handle.remove()
    row = seen[0][0, 2, -1]
    token = getattr(module.config, "image_token_id", None)
    token = module.config.image_token_index if token is None else token
    assert made.mass[name] == pytest.approx(
        float(row[inputs["input_ids"][0] == token].sum()), abs=1e-5
    )
    grids = token_grids(model, inputs, vlm.PROMPT, picture)
    for grid, layer in zip(grids, made.layers(name), strict=True):
        np.testing.assert_allclose(layer.weights, row[grid.slots].numpy(), atol=1e-5)
        assert layer.box == pytest.approx(grid.box, abs=0.01)
    if isinstance(made, TiledOverlay):
        with pytest.raises(InputError, match="no one map"):
            _ = made.maps
    again = PictureOverlay.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made
    kinds = [trace.type for trace in again.figure().data]
    assert kinds.count("heatmap") == len(grids)


@pytest.mark.parametrize("model", ["llava"], indirect=True)
def test_a_picture_that_is_cropped_lies_in_its_middle(model: HookedModel) -> None:
    """CLIP's processor crops: of 96 × 48 pixels the model sees the middle 48."""
    made = overlay(model, pixels(96, 48), vlm.PROMPT, "L0H0")
    assert isinstance(made, Overlay)
    assert made.box == pytest.approx((0.25, 0, 0.75, 1), abs=0.01)
    figure = made.figure()
    heat = next(trace for trace in figure.data if trace.type == "heatmap")
    assert list(heat.x) == pytest.approx([29.5, 41.5, 53.5, 65.5], abs=0.6)
    assert overlay(model, pixels(48, 48), vlm.PROMPT, "L0H0").box == (0, 0, 1, 1)  # type: ignore[union-attr]


@pytest.mark.parametrize("model", ["idefics2", "chameleon", "blip-2"], indirect=True)
def test_tokens_that_lie_nowhere_are_refused(model: HookedModel) -> None:
    with pytest.raises(InputError, match="can't be laid over it"):
        overlay(model, vlm.picture(), vlm.PROMPT, "L0H0")


@pytest.mark.parametrize("model", ["idefics3"], indirect=True)
def test_tiles_and_the_small_copy(model: HookedModel) -> None:
    made = overlay(model, pixels(64, 64), vlm.PROMPT, "L0H0,L1H3")
    assert isinstance(made, TiledOverlay)
    half = [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1), (0, 0, 1, 1)]
    assert np.allclose(made.boxes, half, atol=0.01)
    titles = [note.text for note in made.figure().layout.annotations]
    assert titles[0] == "the picture" and len(titles) == 5
    assert [("small copy" in title) for title in titles] == [False, False, True, False, True]
