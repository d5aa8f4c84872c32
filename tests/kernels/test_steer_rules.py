"""Known interventions as edits of an attention call (ACT, ZeroTuning, VAR), and the edges of the
rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loose import loose, reference_attention, streaming_attention

from interp_kernels import Mask, Received, Request
from interp_kernels.reference import weights
from interp_kernels.steer import Rule, Steer
from interp_kernels.streaming import route as streaming
from interp_kernels.streaming.prepared_steer import segments

BACKENDS = {"reference": reference_attention, "streaming": streaming_attention}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def case(lk: int = 30, heads: int = 3) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, heads, lk, 4, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize("run", BACKENDS.values(), ids=BACKENDS)
def test_act(run: Any) -> None:
    """ACT: sinks × β, the rest × f = 1 + (1 − β)·m_S/(1 − m_S); row 0, which sees only a sink,
    stays as it is."""
    q, k, v = case()
    beta, kwargs = 0.4, {"mask": Mask(), "scale": 0.7}
    labels = torch.zeros(1, 3, 30, dtype=torch.long)
    labels[0, 0, [0, 4, 11]] = labels[0, 1, [0, 20]] = labels[0, 2, 0] = 1
    a, sinks = weights(q, k, **kwargs), (labels == 1)[:, :, None]
    m = (a * sinks).sum(-1, keepdim=True)
    f = 1 + (1 - beta) * m / (1 - m)
    want = torch.where(sinks, beta * a, f * a)
    want[:, :, 0] = a[:, :, 0]
    rule = Rule(torch.tensor([[1.0, beta]]), torch.tensor([[1.0, 0.0]]))
    got = run(q, k, v, **kwargs, steer=Steer(labels=labels, rule=rule))
    torch.testing.assert_close(got.out, want @ v)


@pytest.mark.parametrize("run", BACKENDS.values(), ids=BACKENDS)
def test_zero_tuning(run: Any) -> None:
    """a₀' = γ·a₀/D, a_i' = a_i/D, D = (γ − 1)·a₀ + 1; the same as adding ln γ to the logit."""
    q, k, v = case()
    gamma, kwargs = 1.7, {"mask": Mask(), "scale": 0.7}
    a = weights(q, k, **kwargs)
    d = (gamma - 1) * a[..., :1] + 1
    want = torch.cat([gamma * a[..., :1] / d, a[..., 1:] / d], dim=-1) @ v
    rule = Rule(torch.tensor([[1.0, gamma]]), renormalise=True)
    bias = torch.zeros(1, 1, 30)
    bias[..., 0] = math.log(gamma)
    for steer in (Steer(spans=((0, 1, 1),), rule=rule), Steer(bias=bias.double())):
        torch.testing.assert_close(
            run(q, k, v, **kwargs, steer=steer).out, want, atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("run", BACKENDS.values(), ids=BACKENDS)
def test_spotlight(run: Any) -> None:
    """SpotLight: where ψ = Σ_S a < ψ*, the logits of S get ln(ψ*/ψ): P_S' = ψ*/(1 + ψ* − ψ)."""
    q, k, v = case()
    goal, kwargs = 0.3, {"mask": Mask(), "scale": 0.7}
    a = weights(q, k, **kwargs)
    psi = a[..., 4:9].sum(-1, keepdim=True)
    low = (psi > 0) & (psi < goal)
    assert bool(low.any()) and bool((psi > goal).any())
    raised = torch.where(low, (goal / psi.clamp_min(1e-30)).log(), 0.0)
    logits = a.log()
    logits[..., 4:9] = logits[..., 4:9] + raised
    want = logits.softmax(-1)
    mass = want[..., 4:9].sum(-1, keepdim=True)
    torch.testing.assert_close(mass[low], (goal / (1 + goal - psi))[low])
    rule = Rule(torch.ones(1, 2), torch.tensor([[0.0, goal]]), renormalise=True)
    steer = Steer(spans=((4, 9, 1),), rule=rule)
    got = run(q, k, v, **kwargs, steer=steer).out
    torch.testing.assert_close(got, want @ v, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("run", BACKENDS.values(), ids=BACKENDS)
def test_var(run: Any) -> None:
    """VAR: all sinks × (1 − p), Ω = p·m_S goes to the visual non-sinks in proportion, where Σ_vis A
    ≥ 0.2 and the non-sinks' share of it is ≥ ρ, and only for queries after the image."""
    q, k, v = case()
    p, rho, kwargs = 0.6, 0.5, {"mask": Mask(), "scale": 0.7}
    labels = torch.zeros(
        1, 1, 30, dtype=torch.long
    )  # 0 others, 1 text sinks, 2 visual sinks, 3 visual non-sinks
    labels[..., 0], labels[..., 5:20], labels[..., [7, 12]] = 1, 3, 2
    a = weights(q, k, **kwargs)
    mass = [(a * (labels == g)[:, :, None]).sum(-1, keepdim=True) for g in range(4)]
    vis = mass[2] + mass[3]
    gate = (vis >= 0.2) & (mass[3] >= rho * vis) & (torch.arange(30) >= 20)[:, None]
    moved = torch.where(
        (labels == 3)[:, :, None], a + p * (mass[1] + mass[2]) * a / mass[3].clamp_min(1e-30), a
    )
    moved = torch.where(((labels == 1) | (labels == 2))[:, :, None], (1 - p) * a, moved)
    want = torch.where(gate, moved, a) @ v
    assert gate.any()
    assert not gate[:, :, 20:].all()
    rule = Rule(
        keep=torch.tensor([[1.0, 1 - p, 1 - p, 1.0]]),
        receive=torch.tensor([[0.0, 0.0, 0.0, 1.0]]),
        tests=torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, -rho, 1 - rho]]),
        bounds=torch.tensor([0.2, 0.0]),
        rows=(torch.arange(30) >= 20).expand(2, 30),
    )
    got = run(q, k, v, **kwargs, steer=Steer(labels=labels, rule=rule))
    torch.testing.assert_close(got.out, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("where", ["labels", "spans"])
@pytest.mark.parametrize("run", BACKENDS.values(), ids=BACKENDS)
def test_edges_of_the_rule(run: Any, where: str) -> None:
    q, k, v = case()
    kwargs = {"mask": Mask(), "scale": 0.7}
    plain = run(q, k, v, **kwargs)
    sinks = torch.zeros(1, 1, 30, dtype=torch.long)
    sinks[..., :3] = 1
    place: dict[str, Any] = {"labels": sinks} if where == "labels" else {"spans": ((0, 3, 1),)}
    keep, receive = torch.tensor([[1.0, 0.3]]), torch.tensor([[1.0, 0.0]])
    moved = run(q, k, v, **kwargs, steer=Steer(rule=Rule(keep, receive), **place))
    torch.testing.assert_close(moved.out[:, :, :3], plain.out[:, :, :3])  # no receiver in sight
    assert (moved.out[:, :, 3:] - plain.out[:, :, 3:]).abs().max() > 1e-3
    torch.testing.assert_close(moved.lse, plain.lse)
    zero = torch.zeros(1, 2)
    for rule in (Rule(zero), Rule(zero, zero), Rule(zero, renormalise=True)):  # all mass removed
        assert not run(q, k, v, **kwargs, steer=Steer(rule=rule, **place)).out.any()
    one = torch.ones(1, 2)
    for rule in (Rule(one), Rule(one, one), Rule(one, renormalise=True), Rule(zero, one)):
        same = run(q, k, v, **kwargs, steer=Steer(rule=rule, **place))
        torch.testing.assert_close(same.out, plain.out)


@pytest.mark.parametrize("run", BACKENDS.values(), ids=BACKENDS)
def test_hidden_by_bias(run: Any) -> None:
    """Rows all of whose keys the bias hides: 0 and −inf, no index, but they count as rows that see
    their keys."""
    q, k, v = case()
    bias = torch.zeros(1, 1, 30)
    bias[..., :5] = -math.inf
    rule = Rule(torch.tensor([[1.0, 0.3]]), torch.tensor([[1.0, 0.0]]))
    request = Request(
        names=frozenset({"argmax", "max", "entropy"}), received={"r": Received()}, topk=2
    )
    for extra in ({}, {"rule": rule, "spans": ((3, 8, 1),)}):
        for sinks in (None, torch.randn(3, dtype=torch.float64)):
            got = run(
                q,
                k,
                v,
                mask=Mask(),
                scale=0.7,
                sinks=sinks,
                request=request,
                steer=Steer(bias=bias, **extra),
            )
            assert not got.out[:, :, :5].any()
            assert torch.equal(got.lse[:, :, :5], torch.full_like(got.lse[:, :, :5], -math.inf))
            assert (got.stats["argmax"][:, :, :5] == -1).all()
            assert (got.stats["topk_index"][:, :, 5, 1] == -1).all()
            assert not got.stats["received:r"][..., :5].any()
            assert got.stats["received_count:r"][0, 0].tolist() == list(range(30, 0, -1))


def test_renormalising_what_is_left_of_little() -> None:
    """Float32 keeps its digits where nearly all mass is removed: nothing is found by subtraction
    from 1."""
    q, k, v = (torch.randn(1, 2, 100, 8) for _ in range(3))
    k[:, :, 0], q = 4.0, q.abs() + 1  # the first key takes all but about 1e-8
    rule = Rule(torch.tensor([[1.0, 0.0]]), renormalise=True)
    for steer in (
        Steer(spans=((0, 1, 1),), rule=rule),
        Steer(labels=torch.eye(1, 100, dtype=torch.long)[None], rule=rule),
    ):
        kwargs: dict[str, Any] = {"mask": Mask(), "scale": 0.5, "steer": steer}
        got, want = (
            streaming_attention(q, k, v, **kwargs),
            reference_attention(q.double(), k.double(), v.double(), **kwargs),
        )
        torch.testing.assert_close(
            got.out[:, :, 1:].double(), want.out[:, :, 1:], atol=1e-4, rtol=1e-4
        )


def test_segments() -> None:
    assert segments(((0, 1, 1),), 5) == [(0, 1, 1), (1, 5, 0)]
    assert segments(((0, 3, 1), (2, 4, 2)), 5) == [(0, 2, 1), (2, 4, 2), (4, 5, 0)]
    assert segments(((1, 3, 1), (3, 4, 1), (2, 2, 2)), 5) == [(0, 1, 0), (1, 4, 1), (4, 5, 0)]
    assert segments((), 5) == [(0, 5, 0)]


def test_no_keys_or_queries() -> None:
    rule = Rule(torch.ones(1, 2), torch.ones(1, 2))
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4)
    steer = Steer(
        rule=rule,
        labels=torch.zeros(1, 1, 0, dtype=torch.long),
        blend=torch.rand(2),
        gain=torch.rand(1, 2, 3),
    )
    for run in BACKENDS.values():
        got = run(q, k, k, mask=Mask(), scale=1.0, steer=steer)
        assert not got.out.any()
        got = run(
            q[:, :, :0],
            q,
            q,
            mask=Mask(),
            scale=1.0,
            steer=Steer(blend=torch.rand(2), rule=rule, spans=((0, 1, 1),)),
        )
        assert got.out.shape == (1, 2, 0, 4)


def test_refused_with_sigmoid_and_explained() -> None:
    q, k, v = (torch.randn(1, 2, 300, 4) for _ in range(3))
    kwargs: dict[str, Any] = {"mask": Mask(), "scale": 1.0}
    for run in BACKENDS.values():
        with pytest.raises(ValueError, match="Sink logits"):
            run(q, k, v, **kwargs, sinks=torch.ones(2), steer=Steer(sigmoid=0.0))
        with pytest.raises(ValueError, match="statistics"):
            run(q, k, v, **kwargs, request=Request(topk=1), steer=Steer(sigmoid=0.0))
    rule = Rule(torch.ones(1, 2))

    def explain(request: Request | None = None, **fields: Any) -> str:
        return streaming.explain_route(loose(q, k, v, request=request, steer=Steer(**fields)))

    assert "vendor SDPA + blend + gain (" in explain(gain=torch.ones(1, 1, 1), blend=torch.ones(1))
    one = explain(rule=rule, spans=((0, 1, 1),))
    assert (
        "1 vendor SDPA call and 2 small products merged by log-sum-exp and the rule (plain" in one
    )
    assert "streaming: 3 vendor SDPA calls merged" in explain(rule=rule, spans=((0, 150, 1),))
    labels = torch.zeros(1, 1, 300, dtype=torch.long)
    labels[..., 7::100] = 1
    one = explain(rule=rule, labels=labels)
    assert (
        "1 vendor SDPA call that hides the other groups and products with up to 3 listed keys, "
        "merged" in one
    )
    thirds = torch.arange(300)[None, None] % 3
    assert "several groups of many scattered keys" in explain(
        rule=Rule(torch.ones(1, 3)), labels=thirds
    )
    assert "statistics of edited" in explain(Request(topk=1), rule=rule, spans=((0, 1, 1),))
    assert "vendor SDPA + temper + bias (" in explain(
        bias=torch.zeros(1, 1, 300), temper=torch.ones(1, 1, 1)
    )
    assert "steer.bias" in explain(Request(topk=1), bias=torch.zeros(1, 1, 300))
    assert "beside a bias" in explain(bias=torch.zeros(1, 1, 300), rule=rule, labels=labels)
    assert "steer.sigmoid" in explain(sigmoid=0.0)
    many = tuple((i, i + 1, 1) for i in range(0, 100, 2))
    assert "up to 50 listed keys" in explain(rule=rule, spans=many)
    grown = Rule(torch.ones(1, 2, requires_grad=True))
    assert "merged by log-sum-exp" in explain(rule=grown, spans=((0, 1, 1),))
    grown_bias = torch.zeros(1, 1, 300, requires_grad=True)
    assert "gradient" in explain(bias=grown_bias)
