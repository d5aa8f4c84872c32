"""Edits are values: one object serves several models, blocks and threads at once."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import edits as E
from interp.edits.catalogue import registry
from interp_hooks import HookedModel
from interp_hooks.edit import Edit

PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def two() -> tuple[HookedModel, HookedModel]:
    """pocket-llama, and the same with noise in its weights."""
    one = interp.load("llama")
    module = copy.deepcopy(one.module)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * p.std() * 0.3)
    return one, interp.load(module, tokenizer=one.tokenizer)


def ids_of(model: HookedModel) -> torch.Tensor:
    return model.tokenizer(PROMPT, return_tensors="pt").input_ids


@torch.no_grad()
def logits(model: HookedModel, *edits: Edit) -> torch.Tensor:
    with model.edit(*edits):
        return model(input_ids=ids_of(model)).logits


STATEFUL: dict[str, Callable[[], Any]] = {
    "mean": lambda: E.Ablate("1.4, 1.5, 2.7", mode="mean", reference="ioi"),
    "resample": lambda: E.Ablate("1.4, 2.7", mode="resample", reference="ioi", seed=3),
    "gate": lambda: E.Gate({"1.0": 0.0, "2.1": 0.5}, sink=1, recent=2),
    "zero": lambda: E.Ablate("1.4"),
}


#: those that put something in the place of z, whatever z was
REPLACES = ("mean", "resample", "zero")


@pytest.mark.parametrize("name", STATEFUL)
def test_one_edit_on_two_models_at_once(two: tuple[HookedModel, HookedModel], name: str) -> None:
    one, other = two
    wanted = logits(one, STATEFUL[name]()), logits(other, STATEFUL[name]())
    edit = STATEFUL[name]()
    before = dict(vars(edit))
    with torch.no_grad(), one.edit(edit), other.edit(edit):
        found = one(input_ids=ids_of(one)).logits, other(input_ids=ids_of(other)).logits
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert float((wanted[0] - wanted[1]).abs().max()) > 0.1
    assert vars(edit) == before


def test_backends_of_two_models_do_not_mix(two: tuple[HookedModel, HookedModel]) -> None:
    """A gate's streaming part runs on the backend of its own model."""
    one, other = two
    edit = STATEFUL["gate"]()
    assert edit.bind(one).backend == one.backend  # type: ignore[attr-defined]
    other.backend = "reference"
    try:
        assert edit.bind(other).backend == "reference"  # type: ignore[attr-defined]
        assert edit.bind(one).backend == one.backend  # type: ignore[attr-defined]
    finally:
        other.backend = "auto"


@pytest.mark.parametrize("name", STATEFUL)
def test_one_edit_in_two_threads(two: tuple[HookedModel, HookedModel], name: str) -> None:
    edit = STATEFUL[name]()
    wanted = [logits(m, STATEFUL[name]()) for m in two]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(3):
            found[i].append(logits(two[i], edit))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert len(found[i]) == 3
        for got in found[i]:
            torch.testing.assert_close(got, wanted[i], atol=0, rtol=0)


@pytest.mark.parametrize("name", STATEFUL)
def test_twice_in_one_block_and_nested(two: tuple[HookedModel, HookedModel], name: str) -> None:
    """The same object twice is two equal edits."""
    model, edit = two[0], STATEFUL[name]()
    wanted = logits(model, STATEFUL[name](), STATEFUL[name]())
    torch.testing.assert_close(logits(model, edit, edit), wanted, atol=0, rtol=0)
    with model.edit(edit):
        nested = logits(model, edit)
    torch.testing.assert_close(nested, wanted, atol=0, rtol=0)
    if name in REPLACES:  # doing it again changes nothing
        torch.testing.assert_close(wanted, logits(model, edit), atol=0, rtol=0)


@torch.no_grad()
def test_a_search_for_sinks_remembers_by_block() -> None:
    """VAR's memory is the bound edit's: a text read in an inner block is not the outer one's."""
    model = interp.load("llava")
    picture = interp.scenes.render(interp.scenes.broken(np.random.default_rng(0)))
    inputs = interp.vision.with_images(model, "describe the picture :", [picture])
    edit = E.VAR(tau=1.5, rho=0.0, image_mass=0.0, last_layer=True)
    before = dict(vars(edit))
    with model.edit(E.VAR(tau=1.5, rho=0.0, image_mass=0.0, last_layer=True)):
        wanted = model.generate(**inputs, max_new_tokens=6)
    with model.edit(edit):
        prefix = model(**inputs, use_cache=True)
        with model.edit(edit):
            model(**{**inputs, "input_ids": inputs["input_ids"].flip(0)})
        step = prefix.logits[:, -1:].argmax(-1)
        with model.clean():
            model(**inputs)
        again = model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(again, wanted) and int(step) == int(wanted[0, inputs["input_ids"].shape[1]])
    assert vars(edit) == before
    first, second = edit.bind(model), edit.bind(model)
    assert first.memory is not second.memory  # type: ignore[attr-defined]


def test_edits_are_frozen_dataclasses() -> None:
    for name in registry.names():
        cls: Any = registry.get(name)
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen, name
    edit = E.ScaleHeads({"L1H2": 0.5})
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.scope = "decode"  # type: ignore[misc]
    assert edit == E.ScaleHeads({(1, 2): 0.5}) and hash(edit) == hash(E.ScaleHeads({"1.2": 0.5}))
