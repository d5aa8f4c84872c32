"""Mixture of heads: routers that are learned, their balance and what is saved of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional

import interp
from interp.errors import EditError, InputError
from interp.nn import MixtureOfHeads
from interp_hooks import HookedModel, hook


@pytest.fixture
def model() -> HookedModel:
    return hook(tiny.build("llama"))


def ids(rows: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(3))


def test_with_all_heads_kept_it_begins_as_the_model(model: HookedModel) -> None:
    for straight in (False, True):
        moh = MixtureOfHeads(model, keep=1.0, straight=straight)
        with torch.no_grad():
            moh.weights.zero_()
            wanted = model.logits(ids())
            with moh.on(model):
                found = model.logits(ids())
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), MixtureOfHeads(model, keep=1).on(model):
        assert not torch.allclose(model.logits(ids()), wanted, atol=1e-3)


def test_what_is_learned_is_what_the_edit_does(model: HookedModel, tmp_path: Path) -> None:
    moh = MixtureOfHeads(model, keep=1, seed=4)
    optimizer = torch.optim.Adam(moh.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        with moh.on(model):
            logits = model.logits(ids())
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01
    with torch.no_grad():
        with moh.on(model):
            wanted = model.logits(ids())
        path = interp.edits.save(tmp_path / "router.json", [moh.edit()])
        with model.edit(*interp.edits.load(path)):
            assert torch.equal(model.logits(ids()), wanted)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("padded", [False, True])
def test_balance_is_the_papers_over_real_tokens(model: HookedModel, padded: bool) -> None:
    moh = MixtureOfHeads(model, keep=1, shared=0.25, seed=1)
    with torch.no_grad():
        moh.weights.mul_(100)
    mask = torch.ones(3, 11, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    with torch.no_grad(), moh.on(model), model.capture_resid() as stream:
        model.logits(ids(), mask)
        found = float(moh.balance())
    wanted = []
    for layer in range(2):
        x = stream["pre", layer].double()[mask.bool()]
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        share = torch.softmax(x @ moh.weights[layer, 1:4].detach().double().T, -1)
        kept = functional.one_hot(share.argmax(-1), 3).double()
        # the released code: mean over heads of P f, times heads squared
        wanted.append(float((share.mean(0) * kept.mean(0)).mean()) * 9)
    assert found == pytest.approx(sum(wanted) / 2, abs=1e-4)
    even = MixtureOfHeads(model, keep=3, shared=0.25)
    with torch.no_grad(), even.on(model):
        even.weights.zero_()
        model.logits(ids())
    assert float(even.balance()) == pytest.approx(3.0, abs=1e-5)


def test_straight_gates_are_on_or_off_with_the_soft_gradient(model: HookedModel) -> None:
    from interp.edits.routed_heads import routing

    gen = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, generator=gen, dtype=torch.float64)
    start = torch.randn(6, 7, generator=gen, dtype=torch.float64)
    push = torch.randn(5, 4, generator=gen, dtype=torch.float64)
    gradients = []
    for straight in (False, True):
        weights = start.clone().requires_grad_()
        gates = routing(weights, x, 0, 2, straight).gates
        (gradient,) = torch.autograd.grad((gates * push).sum(), weights)
        gradients.append(gradient)
        if straight:
            assert set(gates.unique().tolist()) == {0.0, 1.0} and bool((gates.sum(-1) == 2).all())
        else:
            torch.testing.assert_close(gates.sum(-1), torch.full((5,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(*gradients)
    assert float(gradients[0].abs().max()) > 1e-3


def test_refusals(model: HookedModel) -> None:
    with pytest.raises(EditError, match="from 1 up"):
        MixtureOfHeads(model, keep=0)
    with pytest.raises(InputError, match="block"):
        MixtureOfHeads(model).balance()
    other = hook(tiny.build("gpt2"))
    wide = interp.edits.RoutedHeads(torch.zeros(2, 6, 31))
    with torch.no_grad(), other.edit(wide), pytest.raises(EditError, match="stream of 31"):
        other.logits(ids())
