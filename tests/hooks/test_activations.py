"""Activations: what flows between heads is read as it is, with gradients, and can be replaced, in
every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from interp.edits import ScaleHeads
from interp_hooks import hook
from interp_hooks.activations import PLACES
from interp_hooks.errors import TapError

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_wires_change_nothing_and_are_what_other_captures_see(tapped: Any, name: str) -> None:
    model, twin = tapped(name)
    plain = twin(input_ids=IDS, use_cache=False).logits
    with model.activations(*PLACES) as activations:
        out = model.logits(IDS)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), model.capture_z() as z, model.capture_resid() as resid:
        model.logits(IDS)
    for layer in range(model.n_layers):
        torch.testing.assert_close(activations["z", layer].detach(), z[layer], rtol=1e-4, atol=1e-5)
        for place in ("pre", "mid", "post"):
            assert ((place, layer) in activations) == ((place, layer) in resid)
            if (place, layer) in resid:
                torch.testing.assert_close(
                    activations[place, layer].detach(), resid[place, layer], rtol=1e-4, atol=1e-5
                )
        assert activations["q", layer].shape == (2, 9, model.n_heads, model.d_head)
        assert (
            activations["k", layer].shape[2] == activations["v", layer].shape[2] == model.n_kv_heads
        )
    torch.testing.assert_close(
        activations["final", model.n_layers - 1].detach(), resid["final"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt"])
@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_those_of_finite_differences(name: str, place: str) -> None:
    """∂m/∂wire · direction against (m(wire + ε·direction) − m(wire − ε·direction)) / 2ε in
    float64."""
    model = hook(tiny.build(name).double(), name=name)
    layer = 1
    with model.activations(place) as activations:
        metric = model.logits(IDS)[:, -1, 5].sum()
    if (place, layer) not in activations:
        assert place == "mid" and name == "neox"  # its blocks run attention and MLP side by side
        return
    (gradient,) = torch.autograd.grad(metric, activations[place, layer])
    direction = torch.randn(
        gradient.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    def moved(by: float) -> float:
        def write(at: str, where: int, tensor: torch.Tensor) -> torch.Tensor | None:
            return (
                tensor + by * direction.reshape(tensor.shape)
                if (at, where) == (place, layer)
                else None
            )

        with torch.no_grad(), model.activations(write=write):
            return float(model.logits(IDS)[:, -1, 5].sum())

    step = 1e-3  # norms of Llama compute in float32
    wanted = (moved(step) - moved(-step)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(wanted, rel=5e-3)
    assert abs(wanted) > 1e-3


def test_frozen_parameters_have_gradients_and_nothing_is_kept_unasked(tapped: Any) -> None:
    from interp.circuits.runs.paired_runs import _leaf

    model = hook(tiny.build("llama"), name="frozen")
    model.module.requires_grad_(False)
    with model.activations("z", write=_leaf(None)) as activations:
        metric = model.logits(IDS)[:, -1, 5].sum()
    own, _ = tapped("llama")
    with own.activations("z") as others:
        same = own.logits(IDS)[:, -1, 5].sum()
    slopes = [
        torch.autograd.grad(m, list(w.values())) for m, w in ((metric, activations), (same, others))
    ]
    for frozen, free in zip(*slopes, strict=True):
        torch.testing.assert_close(frozen, free, rtol=1e-4, atol=1e-6)
    with own._adapter.residual(lambda *_: None, keep=False) as residual, torch.no_grad():
        own.logits(IDS)
    assert not residual and {place for place, _ in others} == {"z"}


def test_replaced_z_is_what_an_untouched_model_makes_of_it(tapped: Any) -> None:
    model, twin = tapped("llama")
    new = torch.randn(2, 9, 4, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), tiny.rewriting_z(twin, 1, lambda z: new):
        wanted = twin(input_ids=IDS, use_cache=False).logits
    with (
        torch.no_grad(),
        model.activations(write=lambda p, la, t: new if (p, la) == ("z", 1) else None),
    ):
        torch.testing.assert_close(model.logits(IDS), wanted, rtol=1e-4, atol=1e-4)


def test_outer_edits_come_first_and_wires_are_gone_afterwards(tapped: Any) -> None:
    model, twin = tapped("llama")
    with (
        torch.no_grad(),
        model.edit(ScaleHeads({"1.2": 0.0})),
        model.activations("z") as activations,
    ):
        model.logits(IDS)
    assert not activations["z", 1][:, :, 2].any() and activations["z", 1][:, :, 1].any()
    with torch.no_grad():
        torch.testing.assert_close(
            model.logits(IDS), twin(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
        )


def test_unknown_places(tapped: Any) -> None:
    model, _ = tapped("llama")
    with pytest.raises(TapError, match="no activation 'mlp'"), model.activations("mlp"):
        pass
