"""σReparam: the acting weight has the spectral norm γ, by numpy's singular values."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import interp
from interp.errors import InputError
from interp.nn import SigmaReparam, fold, reparametrise


@pytest.mark.parametrize("shape", [(8, 4), (4, 8), (6, 6)])
def test_the_spectral_norm_is_gamma(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*shape)
    wrapped = SigmaReparam(copy.deepcopy(layer))
    norm = np.linalg.svd(wrapped.effective().detach().numpy(), compute_uv=False)[0]
    assert norm == pytest.approx(1.0, abs=1e-3)  # γ = 1 at first
    with torch.no_grad():
        wrapped.gamma.fill_(2.5)
    norm = np.linalg.svd(wrapped.effective().detach().numpy(), compute_uv=False)[0]
    assert norm == pytest.approx(2.5, abs=3e-3)
    kept, x = SigmaReparam(copy.deepcopy(layer), keep=True), torch.randn(3, shape[0])
    torch.testing.assert_close(kept(x), layer(x), atol=1e-5, rtol=1e-4)


def test_it_follows_a_weight_that_is_trained() -> None:
    torch.manual_seed(1)
    layer = SigmaReparam(nn.Linear(12, 12))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    target = torch.randn(12, 12)
    for _ in range(200):
        x = torch.randn(64, 12)
        loss = (layer(x) - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    norm = np.linalg.svd(layer.effective().detach().numpy(), compute_uv=False)[0]
    assert norm == pytest.approx(float(layer.gamma), rel=0.02)
    layer.eval()
    before = layer.u.clone()
    layer(torch.randn(2, 12))
    assert torch.equal(layer.u, before)  # a step of iteration is training's alone


def test_gradients_are_those_of_the_formula() -> None:
    torch.manual_seed(2)
    layer = SigmaReparam(nn.Linear(5, 3).double()).eval()
    x, w = torch.randn(4, 5, dtype=torch.float64), layer.weight
    layer(x).square().sum().backward()
    u, v = layer.u.double(), layer.v.double()

    def loss(weight: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return (gamma / (u @ weight @ v) * x @ weight.T + layer.bias).square().sum()

    for name, tensor in (("weight", w), ("gamma", layer.gamma)):
        grad = tensor.grad
        assert grad is not None
        flat = tensor.detach().flatten()
        for i in range(flat.numel()):
            step = torch.zeros_like(flat)
            step[i] = 1e-6
            moved = [(flat + s * step).view_as(tensor) for s in (1, -1)]
            values = [
                loss(m, layer.gamma.detach()) if name == "weight" else loss(w.detach(), m)
                for m in moved
            ]
            slope = float((values[0] - values[1]) / 2e-6)
            assert float(grad.flatten()[i]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_a_model_is_replaced_and_folded_back() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)).eval()
    x = torch.randn(5, 6)
    own = net(x)
    assert reparametrise(net, keep=True) == ["0", "2"]
    torch.testing.assert_close(net(x), own, atol=1e-5, rtol=1e-4)
    saved = copy.deepcopy(net.state_dict())
    assert {"0.gamma", "0.weight", "0.u", "0.v"} <= set(saved)
    with torch.no_grad():
        net[0].gamma.mul_(3)  # type: ignore[union-attr]
    wanted = net(x)
    assert fold(net) == ["0", "2"] and all(type(m) is not SigmaReparam for m in net)
    torch.testing.assert_close(net(x), wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match=r"torch.nn.Linear"):
        SigmaReparam(nn.ReLU())  # type: ignore[arg-type]


def test_a_reparametrised_model_is_tapped() -> None:
    import tiny

    model = tiny.build("llama")
    reparametrise(model, lambda name: "_proj" in name)
    hooked = interp.load(model)
    with hooked.observe("entropy") as seen:
        hooked.logits(torch.arange(8)[None])
    assert seen[0].entropy.shape == (1, 4, 8)
