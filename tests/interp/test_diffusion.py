"""Sampling loops against Euler's method written out, guidance by its formula, a hunt for planted
heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_diffusers
import torch
from sdpa import eager

import interp
from interp import diffusion, scenes
from interp import edits as E
from interp.errors import InputError, MissingExtraError, ModelError
from interp_hooks import Head

LABELS = torch.tensor([0, 3])
NULL = torch.tensor([5, 5])


def blended(n: int, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Head 2 of layer 1 sees itself alone."""
    z = a @ v
    if n % 2 == 1:
        z[:, 2] = v[:, 2]
    return z


@torch.no_grad()
def test_guidance_is_its_formula_and_the_loop_is_eulers() -> None:
    module = tiny_diffusers.build("dit")
    model = interp.load(module)
    found = diffusion.draw(
        model,
        {"class_labels": LABELS},
        {"class_labels": NULL},
        guidance=2.5,
        edits=[E.SoftPAG(1.0, ["L1H2"])],
        weight=0.7,
        steps=4,
        seed=3,
    )
    sigmas = np.append(np.linspace(1, 1 / 1000, 4), 0)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    for now, then in itertools.pairwise(sigmas):
        t = torch.full((2,), float(now) * 1000)

        def predicted(labels: torch.Tensor, x: Any = x, t: Any = t) -> torch.Tensor:
            return module(x, timestep=t, class_labels=labels).sample

        with eager():
            own, none = predicted(LABELS), predicted(NULL)
        with eager(blended):
            edited = predicted(LABELS)
        step = own + 1.5 * (own - none) + 0.7 * (own - edited)
        x = x + (then - now) * step
    torch.testing.assert_close(found, x.float(), atol=1e-4, rtol=1e-3)
    plain = diffusion.draw(model, {"class_labels": LABELS}, steps=4, seed=3)
    assert (plain - found).abs().max() > 1e-2


@torch.no_grad()
def test_other_schedulers_texts_and_learned_variances() -> None:
    """PixArt predicts a variance beside each channel; any scheduler of diffusers is used."""
    model = interp.load(tiny_diffusers.build("pixart"))
    text = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    given = {"encoder_hidden_states": text}
    more: dict[str, Any] = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    scheduler = diffusers.DDIMScheduler()
    drawn = diffusion.draw(model, {**given, **more}, steps=3, scheduler=scheduler)
    assert drawn.shape == (2, 4, 8, 8) and torch.isfinite(drawn).all()
    with model.edit(E.ScaleTokens((0, 2), 0.0, heads=["cross.L1H0", "cross.L1H1"])):
        other = diffusion.draw(model, {**given, **more}, steps=3, scheduler=scheduler)
    assert (drawn - other).abs().max() > 1e-3


WORTH = {Head(0, 1): 1.0, Head(1, 2): 0.5, Head(1, 0): -1.0}


def planted(edits: Sequence[Any], seed: int) -> list[float]:
    """What heads are worth, on four pictures of some noise."""
    heads = [h for edit in edits for h in edit.heads]
    noise = np.random.default_rng(seed).normal(0, 0.05, 4)
    return (sum(WORTH.get(h, 0.0) for h in heads) + noise - noise.mean()).tolist()


def test_a_hunt_finds_planted_heads_and_judges_them_beside_random_ones() -> None:
    model = interp.load(tiny_diffusers.build("dit"))
    seen: list[tuple[int, int, str]] = []
    found = diffusion.hunt(model, planted, rounds=3, draws=6, progress=lambda *at: seen.append(at))
    assert found.heads == [Head(0, 1), Head(1, 2)]
    assert found.gain.mean == pytest.approx(1.5) and found.gain.n == 16
    assert len(found.random) == 6 and found.random.max() < 0.01 and found.beats_random
    kept = found.trials[found.trials.kept]
    assert list(zip(kept["round"], kept["layer"], kept["head"], strict=True)) == [
        (1, 0, 1),
        (2, 1, 2),
    ]
    assert len(found.trials) == 8 + 7 + 6 and seen[-1][0] <= seen[-1][1]
    both = diffusion.hunt(model, planted, rounds=1, top=2, draws=1, held_out=1)
    assert set(both.heads) == {Head(0, 1), Head(1, 2)}
    nothing = diffusion.hunt(model, lambda edits, seed: [-len(edits)], draws=1)
    assert nothing.heads == [] and nothing.notes and not nothing.beats_random


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    model = interp.load(tiny_diffusers.build("dit"))
    for call, words in [
        (lambda: diffusion.draw(model, {"class_labels": LABELS}, guidance=2.0), "needs null"),
        (lambda: diffusion.draw(model, {}), "as many pictures"),
        (lambda: diffusion.draw("llama", {"class_labels": LABELS}), "nothing can be drawn"),
        (lambda: diffusion.hunt(model, planted, rounds=0), "at least 1"),
        (lambda: diffusion.hunt(model, lambda edits, seed: [float("nan")]), "finite number"),
        (lambda: diffusion.hunt(model, lambda edits, seed: []), "finite number"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
    model.module.save_pretrained(tmp_path / "dit")
    again = interp.load(str(tmp_path / "dit"))
    assert again.n_layers == 2 and again.name == "dit"
    with pytest.raises(InputError, match="without device_map"):
        interp.load(str(tmp_path / "dit"), device_map="auto")
    config = tmp_path / "dit" / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("DiTTransformer2DModel", "NoSuchModel"), encoding="utf-8")
    with pytest.raises(ModelError, match="NoSuchModel"):
        interp.load(str(tmp_path / "dit"))
    config.write_text(text, encoding="utf-8")
    (tmp_path / "dit" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="can't be loaded"):
        interp.load(str(tmp_path / "dit"))
    monkeypatch.setattr("interp.support.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"interp\[diffusion\]"):
        interp.load(str(tmp_path / "dit"))


def test_dots_are_read_as_they_were_drawn() -> None:
    for seed in range(200):
        shown = scenes.dots(seed)
        read = scenes.read_dots(scenes.draw_dots(shown))
        assert read.cells == shown.cells and read.color == shown.color
        assert set(read.colors) == {None, shown.color} or len(shown.cells) == 9
    noise = np.random.default_rng(0).uniform(-1, 1, (3, 24, 24))
    assert scenes.read_dots(noise).cells == ()
    with pytest.raises(InputError, match="24"):
        scenes.read_dots(np.zeros((3, 8, 8)))
