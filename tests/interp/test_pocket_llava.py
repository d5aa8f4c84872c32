"""The bundled vision-language model: it tells and answers what is there, and where it looks is
where things are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp import scenes, vision
from interp.edits import ScaleTokens
from interp.evaluation.pictures import answers, counted, plain, ratios, under
from interp.scenes import PARTNER
from interp.tasks.chair import Chair
from interp.tasks.pope import Pope
from interp.vision.overlay import overlay
from interp_hooks import HookedModel


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return interp.load("llava")


def rates(model: HookedModel, task, n: int, method=plain) -> dict[str, float]:  # type: ignore[no-untyped-def]
    problems = task.problems(n, seed=5)
    found = ratios(
        task, counted(task, problems, answers(model, problems, method, task.max_new_tokens))
    )
    return {name: float(value[0]) for name, value in found.items()}


@pytest.mark.slow
def test_it_sees_usual_scenes_and_invents_in_broken_ones(model: HookedModel) -> None:
    usual, broken = (rates(model, Chair(world=world), 60) for world in ("usual", "broken"))
    assert usual["object F1"] > 0.88 and usual["CHAIR_I"] < 0.15
    assert broken["CHAIR_I"] > usual["CHAIR_I"] + 0.1
    assert rates(model, Pope(world="usual", split="random"), 120)["accuracy"] > 0.9
    assert rates(model, Pope(world="broken", split="adversarial"), 120)["accuracy"] < 0.9


def test_without_the_image_it_can_only_guess(model: HookedModel) -> None:
    """Hiding the image's tokens takes away what it knows."""
    hidden = rates(model, Pope(world="usual", split="random"), 80, under(ScaleTokens("image", 0.0)))
    assert hidden["accuracy"] < 0.7


def test_what_it_invents_is_what_it_expects(model: HookedModel) -> None:
    task = Chair(world="broken")
    problems = task.problems(60, seed=6)
    made_up = [
        (name, p.info["names"])
        for p, said in zip(
            problems, answers(model, problems, plain, task.max_new_tokens), strict=True
        )
        for name in task.named(said) - p.info["names"]
    ]
    assert len(made_up) > 10
    assert np.mean([PARTNER.get(name) in there for name, there in made_up]) > 0.7


def test_some_head_looks_at_the_object_that_is_named_next(model: HookedModel) -> None:
    """From the colour before an object's name, more than half of some head's attention is on the
    object's cell."""
    best = []
    for seed in range(8):
        scene = scenes.usual(np.random.default_rng([11, seed]))
        thing = scene.things[0]
        heads = [h for h in model.heads if h.tower == "text"]
        seen = overlay(
            model, scenes.render(scene), f"describe the picture : a {thing.color}", heads
        )
        share = []
        for grid in seen.maps.values():
            weights = np.kron(np.array(grid), np.ones((6, 6))) / 36
            cell = weights[
                16 * thing.row : 16 * thing.row + 16, 16 * thing.column : 16 * thing.column + 16
            ]
            share.append(cell.sum())
        best.append(max(share))
    assert np.median(best) > 0.5


def test_prompts_of_the_card(model: HookedModel) -> None:
    scene = scenes.usual(np.random.default_rng(1))
    inputs = vision.with_images(model, "<image> is there a chair ?", [scenes.render(scene)])
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]]) in ("yes", "no")
