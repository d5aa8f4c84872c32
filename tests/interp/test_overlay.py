"""Attention over a picture: the weights are the eager ones, in their places; it saves; it draws."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import train_pocket_llava as script

import interp
from interp import scenes
from interp.errors import HeadError, InputError
from interp.results.overlay import Overlay
from interp.vision.overlay import overlay
from interp.vision.prompts import with_images
from interp_hooks import HookedModel, hook


@pytest.fixture(scope="module")
def model() -> HookedModel:
    processor = script.build_processor()
    return hook(
        script.build_model(processor.tokenizer, 0), name="random llava", processor=processor
    )


def picture(seed: int = 0):  # type: ignore[no-untyped-def]
    return scenes.render(scenes.usual(np.random.default_rng(seed)))


@pytest.mark.parametrize("token", [-1, -3, 67])
def test_weights_are_the_eager_ones(model: HookedModel, token: int) -> None:
    prompt = "is there a chair ?"
    found = overlay(model, picture(), prompt, ["L1H2", "text.L3H7"], token)
    inputs = with_images(model, prompt, [picture()])
    with torch.no_grad():
        weights = tiny.eager(model.module)(**inputs, output_attentions=True).attentions
    for name, layer, head in (("text.L1H2", 1, 2), ("text.L3H7", 3, 7)):
        wanted = weights[layer][0, head, token, 1:65]
        assert np.allclose(np.array(found.maps[name]), wanted.view(8, 8).numpy(), atol=1e-5)
        assert found.mass[name] == pytest.approx(float(wanted.sum()), abs=1e-4)
    assert found.token == model.tokenizer.decode(inputs["input_ids"][0, token])


def test_places_are_those_of_the_patches(model: HookedModel) -> None:
    """A change of one patch of the picture changes what is seen of it most: row 2, column 5."""
    changed = np.asarray(picture()).copy()
    changed[12:18, 30:36] = 255
    before, after = (np.array(overlay(model, p, "describe the picture :", "L0H0").maps["text.L0H0"])
                     for p in (picture(), _image(changed)))  # fmt: skip
    difference = np.abs(np.log(after) - np.log(before))
    assert np.unravel_index(difference.argmax(), (8, 8)) == (2, 5)


def _image(pixels: np.ndarray):  # type: ignore[no-untyped-def]
    from PIL import Image

    return Image.fromarray(pixels)


def test_saved_and_drawn(model: HookedModel, tmp_path: Path) -> None:
    file = tmp_path / "scene.png"
    picture().save(file)
    made = overlay(model, file, "is there a cup ?", "L0H0,L2H1,L3H3,L3H4,L3H5")
    made = replace(made, sinks={**made.sinks, "text.L2H1": [(1, 1), (7, 7)]})
    again = Overlay.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made and np.array_equal(np.asarray(again.image()), np.asarray(picture()))
    figure = again.figure()
    kinds = [trace.type for trace in figure.data]
    assert kinds.count("image") == 6 and kinds.count("heatmap") == 5
    crosses = next(trace for trace in figure.data if trace.type == "scatter")
    assert list(crosses.x) == pytest.approx([8.5, 44.5]) and list(crosses.y) == pytest.approx(
        [8.5, 44.5]
    )


def test_sinks_are_marked_where_they_are(model: HookedModel) -> None:
    """A dimension that is massive at the first token and at two image tokens, planted in the
    stream."""
    plan = {0: 60.0, 1 + 10: 50.0, 1 + 63: -70.0}

    def plant(place: str, layer: int, stream: torch.Tensor) -> torch.Tensor | None:
        if (place, layer) != ("pre", 1):
            return None
        stream = stream.clone()
        for token, value in plan.items():
            stream[:, token, 7] = value
        return stream

    with model.capture_resid(plant):
        made = overlay(model, picture(), "is there a cup ?", "L0H0,L1H1")
    assert made.sinks == {"text.L0H0": [], "text.L1H1": [(1, 2), (7, 7)]}


def test_what_cannot_be_shown(model: HookedModel) -> None:
    with pytest.raises(InputError, match="no token 500"):
        overlay(model, picture(), "is there a cup ?", "L0H0", 500)
    with pytest.raises(InputError, match="text tower"):
        overlay(model, picture(), "is there a cup ?", "vision.L0H0")
    with pytest.raises(HeadError):
        overlay(model, picture(), "is there a cup ?", "L9H0")
    with pytest.raises(InputError, match="takes no images"):
        overlay(interp.load("llama"), picture(), "a", "L0H0")


def test_the_report_shows_it(model: HookedModel, tmp_path: Path) -> None:
    atlas = interp.scan_heads(model, scores="image_mass", samples=1, context=64, progress=False)
    assert atlas.overlays and len(atlas.overlays[0].maps) == 7
    page = (
        interp.Atlas.load(atlas.save(tmp_path))
        .report(tmp_path / "report.html")
        .read_text(encoding="utf-8")
    )
    assert (
        'href="#overlay-0-section"' in page
        and 'id="overlay-0-section"' in page
        and 'id="overlay-0"' in page
    )
    found = re.search(r'id="overlay-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None and len(page) < 1_000_000  # drawn without plotly.js
    drawn, kept = json.loads(found[1])["overlay-0"], atlas.overlays[0]
    weights = {h: np.array(kept.maps[h]) for h in kept.heads}
    assert drawn["top"] == max(w.max() for w in weights.values())  # one scale for all heads
    assert [p["title"].split(" ")[0] for p in drawn["panels"][1:]] == [
        h.partition(".")[2] for h in kept.heads
    ]
    for panel, own in zip(drawn["panels"][1:], weights.values(), strict=True):
        np.testing.assert_allclose(panel["layers"][0]["weights"], own, rtol=1e-3)


def test_heads_that_look_are_drawn_on_one_scale(model: HookedModel) -> None:
    what = "vhd,image_mass,image_excess"
    atlas = interp.scan_heads(model, scores=what, samples=1, context=64, progress=False)
    (made,) = atlas.overlays
    # vhd says whose output changes, not who looks
    assert made.by == "Image excess"
    ranked = atlas.frame.sort_values("image_excess", ascending=False)[["layer", "head"]]
    assert made.heads == [f"text.L{la}H{h}" for la, h in ranked.head(7).to_numpy().tolist()]
    figure = made.figure()
    assert {t.coloraxis for t in figure.data if t.type == "heatmap"} == {"coloraxis"}
    assert figure.layout.coloraxis.cmax == made.top and figure.layout.coloraxis.colorbar.title.text
