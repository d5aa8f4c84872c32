"""Which tokens are sinks: the published τ where it can be reached, no dimension that all tokens
share, and a word of how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tiny_vision
import torch
from test_vision_scores import DESCRIBE, PLANTED, build, measured, picture, planted

import interp
from interp.edits import VAR
from interp.probes.image import image_batch
from interp.vision.prompts import with_images
from interp.vision.sinks import find_sinks, ratios, shared_dims, tau_of
from interp_hooks import HookedModel, hook

BIAS = 11


@pytest.mark.parametrize(
    ("width", "tau"),
    [(None, 20), (4096, 20), (960, 20), (576, 20), (512, 20), (484, 20), (256, 5), (64, 2.5)],
)
def test_tau_is_the_papers_where_a_token_can_reach_it(width: int | None, tau: float) -> None:
    assert tau_of(width) == pytest.approx(tau)
    assert width is None or tau_of(width) < width**0.5


def stream(tokens: int = 40, width: int = 576) -> torch.Tensor:
    """One like SmolLM2's: dimension 507 is about 12 × RMS in every token, 23.8 × in the first."""
    x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0))
    x[..., 507] = 14.0
    x[:, 0, 507] = 180.0
    return x


class Nameless:
    module = object()


def test_a_bias_of_every_token_is_no_sink() -> None:
    x = stream()
    size = ratios(x)
    assert 11 < float(size[0, 1:, 507].median()) < 13 and 23 < float(size[0, 0, 507]) < 24
    first = torch.zeros(1, dtype=torch.long)
    found, defined = find_sinks(Nameless(), x, first)  # type: ignore[arg-type]
    assert bool(defined) and found.nonzero().tolist() == [[0, 0]]
    # a bias that itself reaches τ tells nothing
    x[..., 507] = 150.0
    found, defined = find_sinks(Nameless(), x, first)  # type: ignore[arg-type]
    assert not bool(defined) and not bool(found.any())


def test_the_median_is_of_real_tokens_and_of_each_kind() -> None:
    """23 of 33 tokens high in dimension 3: shared; 10 padding tokens don't count; of the image's 10
    tokens 6 are high in dimension 4, of all 36 only 6."""
    size = torch.zeros(1, 36, 8)
    size[:, :16, 3] = 30.0
    real = torch.ones(1, 36, dtype=torch.bool)
    assert not bool(shared_dims(size, 20, real).any())
    real[:, 30:] = False  # 16 of 30
    assert shared_dims(size, 20, real).nonzero().tolist() == [[0, 3]]
    image = torch.zeros(1, 36, dtype=torch.bool)
    image[:, 5:15] = True
    size = torch.zeros(1, 36, 8)
    size[:, 5:11, 4] = 30.0
    assert not bool(shared_dims(size, 20).any())
    assert shared_dims(size, 20, None, image).nonzero().tolist() == [[0, 4]]
    image[:, 12:] = False  # 7 image tokens: too few for a median of their own
    assert not bool(shared_dims(size, 20, None, image).any())


@contextmanager
def biased(module: Any, layer: int = 1) -> Iterator[None]:
    """A dimension that every token shares on entry of a layer, beyond τ, the first token too."""

    def write(block: Any, args: tuple, kwargs: dict) -> Any:
        x = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone()
        x[..., BIAS] = 400.0
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": x}
        return (x, *args[1:]), kwargs

    handle = module.model.language_model.layers[layer].register_forward_pre_hook(
        write, with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["visual_sink", "visual_nonsink_ratio", "image_centric"])
def test_scores_of_a_model_with_a_bias_dimension(name: str) -> None:
    """In a stream of 512 whose tokens all share a bias no image token is a sink: there is no value,
    where each head read 1.000."""
    model, _ = build("wide-llava", 512, 2, seed=2)
    batch = image_batch(model, with_images(model, DESCRIBE, [picture(0)]))
    with biased(model.module):
        assert np.isnan(measured(model, name, batch)).all()


def test_the_atlas_says_how_many_tokens_are_sinks() -> None:
    model, _ = build("wide-llava", 512, 2, seed=2)
    with planted([model.module], [[0, *PLANTED]]):
        atlas = interp.scan_heads(model, ["visual_sink", "image_mass"], 32, 2, progress=False)
    (note,) = [n for n in atlas.notes if n.startswith("visual sinks:")]
    assert note.startswith(f"visual sinks: {len(PLANTED)} of a picture's 64 tokens are sinks")
    atlas = interp.scan_heads(model, ["image_mass"], 32, 1, progress=False)
    assert not any("sinks" in note for note in atlas.notes)


def test_var_leaves_a_bias_alone_and_says_how_many_tokens_are_sinks() -> None:
    module, given = tiny_vision.build("llava")
    model: HookedModel = hook(module, sample=given)
    edit = VAR(tau=4.0, rho=0.0, image_mass=0.0, last_layer=True)
    with torch.no_grad(), biased(module):
        plain = model(**given).logits
        with model.edit(edit):
            assert torch.equal(model(**given).logits, plain)
        with model.edit(VAR(tau=4.0, dims=[BIAS], rho=0.0, image_mass=0.0, last_layer=True)):
            named = model(**given).logits  # as the user says
    assert not torch.equal(named, plain)
    with biased(module), model.edit(edit):
        assert "0 of 24 tokens are sinks" in model.explain()
