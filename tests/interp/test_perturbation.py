"""Bounded changes of a head's scores, against eager attention with the change in its mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import interp
from interp.errors import InputError
from interp.mechanics import perturbation
from interp.mechanics.perturbation import _kl


def one_head() -> Any:
    """A model of one layer and one head, whose scores a 4-D mask changes."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, attn_implementation="eager",
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.5)
    return model


def log_probs(plain: Any, ids: list[int], delta: torch.Tensor) -> torch.Tensor:
    n = len(ids)
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
    mask = torch.cat([mask[:-1], delta[None]])  # the last row sees all keys
    return (
        plain(input_ids=torch.tensor([ids]), attention_mask=mask[None, None])
        .logits[0, -1]
        .log_softmax(-1)
    )


def test_slopes_and_changes_are_those_of_eager_attention() -> None:
    plain = one_head()
    ids, y, epsilon = [3, 7, 20, 7, 31, 5, 9], 11, 0.7
    delta = torch.zeros(len(ids), requires_grad=True)
    own = log_probs(plain, ids, delta)
    (g,) = torch.autograd.grad(own[y], delta)
    found = perturbation(interp.load(plain), ids, y, epsilon, draws=3)
    row = found.frame.iloc[0]
    assert found.log_prob == pytest.approx(float(own[y].detach()), abs=1e-4)
    assert row.slope == pytest.approx(float(g.norm()), rel=1e-3)
    for sign, name in ((-1, "lowered"), (1, "raised")):
        with torch.no_grad():
            there = log_probs(plain, ids, sign * epsilon * g / g.norm())
        assert row[name] == pytest.approx(float(there[y] - own[y].detach()), abs=1e-4)
    rng = torch.Generator().manual_seed(0)
    r = torch.randn(1, len(ids), generator=rng)[0]
    near = (0.1 * r / r.norm()).requires_grad_()
    (v,) = torch.autograd.grad(_kl(own.detach(), log_probs(plain, ids, near)[None]).sum(), near)
    with torch.no_grad():
        kl = _kl(own, log_probs(plain, ids, epsilon * v / v.norm())[None])
    assert row.kl == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
    with torch.no_grad():
        drawn = [torch.randn(1, len(ids), generator=rng)[0] for _ in range(3)]
        there = torch.stack([log_probs(plain, ids, epsilon * d / d.norm()) for d in drawn])
    assert row.random == pytest.approx(float((there[:, y] - own[y]).abs().mean()), abs=1e-4)
    assert float(_kl(own.detach(), there).mean()) > 1e-4
    assert row.random_kl == pytest.approx(float(_kl(own.detach(), there).mean()), rel=2e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_each_head_is_changed_alone_and_the_gradient_is_the_worst(worded: Any, name: str) -> None:
    """Of directions of one small length none lowers log P(y) more than the gradient's."""
    model, _ = worded(name)
    ids = list(range(20, 34))
    found = perturbation(model, ids, epsilon=1e-2, draws=12, seed=3)
    frame = found.frame
    assert len(frame) == model.n_layers * model.n_heads
    small = 0.02 * frame.slope.max() * 1e-2
    assert (frame.lowered <= -frame.random + small).all()
    np.testing.assert_allclose(frame.raised, 1e-2 * frame.slope, rtol=0.05, atol=1e-5)
    np.testing.assert_allclose(frame.lowered, -1e-2 * frame.slope, rtol=0.05, atol=1e-5)


def test_what_it_refuses(pocket: Any) -> None:
    with pytest.raises(InputError, match="fewer than two"):
        perturbation(pocket, [5])
    with pytest.raises(InputError, match="above 0"):
        perturbation(pocket, [5, 6, 7], epsilon=0)
    with pytest.raises(InputError, match="tokens, and y is one"):
        perturbation(pocket, [5, 6, 7], answer="the cat saw")
    with pytest.raises(InputError, match="vocabulary has"):
        perturbation(pocket, [5, 6, 7], answer=10**6)
    found = perturbation(pocket, "the cat saw the dog . the cat saw the", draws=1)
    assert "log P of the answer" in found._repr_html_() and len(found.top(3)) == 3
