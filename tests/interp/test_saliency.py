"""Five attributions against their definitions: DeepLIFT by functions and sums, completeness,
occlusion by hand, relevance that adds up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mechanics import Worded, by_embeddings, linear_model

from interp import mechanics
from interp.errors import TapError
from interp.evaluation.accuracy import sample
from interp.mechanics.saliency import SALIENCIES, Entered
from interp.streams.backward import same
from interp.streams.secants import Secants, _log_mean, product, secant, square, twin
from interp_hooks import hook
from interp_hooks.call import AttentionCall, Site
from interp_kernels import Mask, attention

FAMILIES = ["llama", "gpt2", "gemma2", "gemma3", "olmo2", "neox", "qwen3", "opt", "phi3"]
IDS = torch.arange(3, 12)[None] * 29 % 101


def entered(name: str, module: Any = None) -> Entered:
    """The stream that enters a tiny model, beside one further off, and two of its logits."""
    model = hook(tiny.build(name, seed=2) if module is None else module, name=name)
    first = min(s.layer for s in model.sites)

    def run(shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaves: list[torch.Tensor] = []

        def write(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
            if (place, layer) != ("pre", first):
                return None
            leaves.append((tensor.detach() + shift).requires_grad_())
            return leaves[-1]

        with torch.enable_grad(), model.capture_resid(write):
            logits = model(input_ids=IDS.expand(len(shift), -1), use_cache=False).logits
        return logits[:, -1, [7, 40]], leaves[0]

    with model.capture_resid() as stream, torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    value = stream["pre", first][0]
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * value.std()
    return Entered(model, value, value + noise, run)


@pytest.mark.parametrize("name", FAMILIES)
def test_deeplift_is_complete_in_two_runs(name: str) -> None:
    """Σ a = m(x) − m(b): norms, gates, activations, softcaps and softmax, whatever the family."""
    given_ = entered(name)
    found = SALIENCIES["deeplift"](given_, 1)
    own, other = given_.outputs(torch.stack([given_.still()[0], -given_.difference]))
    assert found.shape == (2, 9) and (own - other).abs().min() > 1e-3
    torch.testing.assert_close(found.sum(-1), own - other, rtol=1e-4, atol=1e-5)


def test_what_deeplift_does_not_know_is_refused(worded: Worded) -> None:
    with pytest.raises(TapError, match="misses"):
        SALIENCIES["deeplift"](entered("gpt_oss"), 1)
    model = worded("gpt_oss")[0]
    found = mechanics.attributions(model, sample(model, "ioi", 1, 3)[1][0], steps=2)
    assert found.deeplift is None and found.refused is not None
    assert "misses" in found.refused["deeplift"]
    frame = mechanics.agreement(model, "ioi", n=1, steps=2)
    assert frame["tau_deeplift"].isna().all() and frame["tau_gradient"].notna().any()
    assert any("deeplift misses" in note for note in frame.attrs["notes"])


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 2.0]),
    st.sampled_from([0.3, 30.0]),
)
def test_attention_between_two_runs_is_complete(
    seed: int, causal: bool, sink: bool, softcap: float | None, scale: float
) -> None:
    """Each entry of z: Σ slopes · Δ over q, k and v is its change, where weights round to 0 too."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, n, 5, 4, generator=draw, dtype=torch.float64).requires_grad_()
        for n in (4, 2, 2)
    )
    sinks = torch.randn(4, generator=draw, dtype=torch.float64) if sink else None
    dense = torch.randn(1, 4, 5, 5, generator=draw, dtype=torch.float64)
    rows = torch.ones(2, 5, dtype=torch.bool)
    mask = Mask(causal=causal, keys=rows, queries=rows, dense=dense)
    site = Site("", 0, "self", "", 4, 2, 4)
    call = AttentionCall(
        site=site, query=q, key=k, value=v, mask=mask, scaling=scale, softcap=softcap, sinks=sinks
    )
    wanted = attention(q, k, v, **call.settings, backend="reference").out
    z = Secants().attended(call)
    assert z is not None
    torch.testing.assert_close(z, wanted.transpose(1, 2), rtol=1e-9, atol=1e-9)
    place = tuple(int(torch.randint(n, (), generator=draw)) for n in z.shape[1:])
    slopes = torch.autograd.grad(z[(0, *place)], [q, k, v])
    found = sum(
        float(((t.detach()[0] - t.detach()[1]) * s[0]).sum())
        for t, s in zip((q, k, v), slopes, strict=True)
    )
    change = float(z[(0, *place)].detach() - z[(1, *place)].detach())
    assert found == pytest.approx(change, rel=1e-6, abs=1e-9)


def test_slopes_are_those_of_the_lines_through_both_runs() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0], [2.0, 1.0, 3.0]], dtype=torch.float64).requires_grad_()
    relu = secant(x, x.relu())
    assert torch.equal(relu, x.relu())
    (slope,) = torch.autograd.grad(relu[0].sum(), x)
    assert slope.tolist() == [[1.0, pytest.approx(1 / 3), 1.0], [0.0, 0.0, 0.0]]
    (slope,) = torch.autograd.grad(square(x)[0].sum(), x)
    assert slope[0].tolist() == [3.0, -1.0, 6.0]  # x + x'
    a, b = x, x.flip(-1)
    (slope,) = torch.autograd.grad(product(a, b.detach().requires_grad_())[0].sum(), x)
    assert slope[0].tolist() == [3.0, -0.5, 1.5]  # the mean of the other factor
    assert torch.equal(twin(x), x.detach().flip(0))
    assert torch.equal(same(x, 2 * x), x)


def test_the_mean_of_exponentials() -> None:
    x, y = torch.tensor([0.3, -800.0, 5.0, 1.0]).double(), torch.tensor([0.7, 2.0, 5.0, 1.0 + 1e-9])
    found = _log_mean(x, y.double()).exp().numpy()
    e = np.exp(x.numpy()), np.exp(y.double().numpy())
    wanted = [(e[0][i] - e[1][i]) / float(x[i] - y[i].double()) for i in range(2)]
    np.testing.assert_allclose(found[:2], wanted, rtol=1e-9)
    np.testing.assert_allclose(found[2:], e[0][2:], rtol=1e-8)


def test_in_a_linear_model_all_differences_are_one(tokenizer: Any) -> None:
    """Gradient × difference, integrated, occluded and DeepLIFT's are the same there."""
    model = hook(linear_model(len(tokenizer)), tokenizer=tokenizer)
    instance = sample(model, "ioi", 1, 0)[1][0]
    found = mechanics.attributions(model, instance, 1)
    assert found.occlusion is not None and found.deeplift is not None and found.lrp is not None
    np.testing.assert_allclose(found.occlusion, found.integrated, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(found.deeplift, found.integrated, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(found.lrp, found.gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_occlusion_and_relevance_are_their_definitions(worded: Worded, name: str) -> None:
    model, plain = worded(name)
    instance = sample(model, "ioi", 1, 3)[1][0]
    table = plain.get_input_embeddings().weight.detach()
    e, b = table[list(instance.prompt)], table.mean(0)
    found = mechanics.attributions(model, instance, steps=2)
    hidden = e.repeat(len(e), 1, 1)
    hidden[range(len(e)), range(len(e))] = b
    m = by_embeddings(plain, instance, torch.cat([e[None], hidden]))[0]
    assert found.occlusion is not None and found.lrp is not None and found.deeplift is not None
    np.testing.assert_allclose(found.occlusion, m[0] - m[1:], atol=1e-4, rtol=1e-3)
    change = found.metric - found.baseline
    assert found.deeplift.sum() == pytest.approx(change, rel=1e-4, abs=1e-4)
    if name == "llama":  # no biases, and no learned positions: all relevance comes from the tokens
        assert found.lrp.sum() == pytest.approx(found.metric, rel=1e-3, abs=1e-4)


def test_methods_are_compared_with_each_other(worded: Worded) -> None:
    frame = mechanics.agreement(worded("llama")[0], "ioi", n=3, steps=4)
    table = frame.attrs["methods"]
    assert set(table) == set(SALIENCIES)
    for a in SALIENCIES:
        assert table[a][a]["mean"] == 1
        for b in SALIENCIES:
            assert table[a][b] == pytest.approx(table[b][a])
            assert table[a][b]["low"] <= table[a][b]["mean"] <= table[a][b]["high"]
