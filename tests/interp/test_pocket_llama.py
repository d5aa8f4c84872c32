"""The bundled model does the tasks it is analysed on, has grown the heads looked for, and needs
them.

Problems come from seeds that neither training nor the model card used.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp.evaluation.evaluate import evaluate
from interp.tasks.niah import NeedleInAHaystack
from interp_hooks.model import HookedModel

SEED = 31_000
BARS = {
    "induction": (0.95, 1.0),
    "ioi": (0.95, 1.0),
    "colored_objects": (0.9, 1.0),
    "docstring": (0.9, 1.0),
    "greater_than": (0.9, 1.0),
    "classification": (0.6, 0.9),
}


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return interp.load("llama")


@pytest.fixture(scope="module")
def atlas(model: HookedModel) -> interp.Atlas:
    return interp.scan_heads(
        model, scores="retrieval,previous_token,induction", samples=12, seed=SEED, progress=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", BARS)
def test_ability(model: HookedModel, task: str) -> None:
    low, high = BARS[task]
    assert low <= evaluate(model, task, n=150, seed=SEED).baseline.mean <= high


@pytest.mark.slow
def test_answers_needles_at_its_trained_length(model: HookedModel) -> None:
    assert model.max_context is not None and model.max_context >= 1024
    found = evaluate(model, NeedleInAHaystack(lengths=(1024,)), n=40, seed=SEED).baseline
    assert found.mean >= 0.95


def test_kinds_of_heads(model: HookedModel, atlas: interp.Atlas) -> None:
    for score, least in (("previous_token", 0.4), ("induction", 0.4), ("retrieval", 0.1)):
        assert np.ma.max(atlas[score]) >= least, score
    retrieval = int((atlas["retrieval"] >= 0.1).sum())
    assert 0 < retrieval < len(model.heads) / 2, "retrieval heads are a minority"


def test_sink_heads_at_64_tokens(model: HookedModel) -> None:
    short = interp.scan_heads(
        model, scores="sink", context=64, samples=32, seed=SEED, progress=False
    )
    assert np.ma.max(short["sink"]) > 0.3


@pytest.mark.slow
def test_needles_need_the_retrieval_heads_and_not_random_ones(
    model: HookedModel, atlas: interp.Atlas
) -> None:
    heads = [h for h in atlas.top("retrieval", 32) if atlas.value(h, "retrieval") >= 0.1]
    result = interp.ablate(
        model, heads[:5], task=NeedleInAHaystack(lengths=(512,)), n=30, seed=SEED, avoid=heads
    )
    assert result.baseline.low >= 0.8
    assert result.difference.high < -0.5, "the needle is lost without its heads"
    assert result.control is not None and result.control_difference is not None
    assert result.control_difference.low > result.difference.high, (
        "random heads cost less, beyond the intervals"
    )


def test_shortcut_says_what_it_is(model: HookedModel) -> None:
    assert model.name == "pocket-llama"
    assert (
        model.note is not None
        and "bundled pocket-llama" in model.note
        and "llama-3.1-8b" in model.note
    )


def test_any_text_survives_the_tokenizer(model: HookedModel) -> None:
    for text in (
        "Hello Wörld!\n\tx = foo(bar)\n",
        "日本語 and 🙂",
        "two  spaces ",
        "def f(self, x):\n    return 17",
    ):
        ids = model.tokenizer.encode(text)
        assert model.tokenizer.decode(ids, skip_special_tokens=True) == text
        assert int(torch.tensor(ids).max()) < model.module.config.vocab_size
