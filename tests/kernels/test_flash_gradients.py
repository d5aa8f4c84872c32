"""Gradients of queries, keys and values go through the vendor's own backward pass, against those of
the definition in float64; and nothing (queries, keys) is made on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from shapes import Ledger

from interp_kernels import Mask, Request, Rule, Steer, attention, explain
from interp_kernels.streaming import flash_gradients, route, spans, vendor

KEYS = torch.ones(2, 40, dtype=torch.bool)
KEYS[0, :7] = KEYS[1, 33:] = False


def act(groups: int = 2) -> Rule:
    return Rule(torch.tensor([[1.0, 0.3, 0.6][:groups]]), torch.tensor([[1.0, 0.0, 0.2][:groups]]))


LABELS = (torch.arange(40) % 11 == 3).long()[None, None].expand(1, 4, 40).contiguous()
CASES: dict[str, dict[str, Any]] = {
    "square": dict(),
    "padded": dict(mask=Mask(keys=KEYS)),
    "whole": dict(mask=Mask(causal=False)),
    "prefix": dict(mask=Mask(q_start=15)),
    "prefix padded": dict(mask=Mask(q_start=15, keys=KEYS)),
    "static cache": dict(mask=Mask(keys=KEYS), queries=25),
    "sinks": dict(sinks=torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)),
    "temper": dict(steer=Steer(temper=torch.full((1, 4, 1), 1.7))),
    "gain": dict(steer=Steer(gain=torch.rand(1, 4, 1), blend=torch.rand(4))),
    "bias": dict(steer=Steer(bias=torch.linspace(-1, 1, 40)[None, None])),
    "ACT": dict(steer=Steer(rule=act(), spans=((0, 1, 1), (9, 12, 1)))),
    "ACT padded": dict(
        steer=Steer(rule=act(3), spans=((0, 9, 1), (20, 40, 2))), mask=Mask(keys=KEYS)
    ),
    "ACT sinks prefix": dict(
        steer=Steer(rule=act(), spans=((0, 2, 1),)),
        mask=Mask(q_start=15),
        sinks=torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64),
    ),
    "scattered": dict(steer=Steer(rule=act(), labels=LABELS)),
    "scattered padded": dict(steer=Steer(rule=act(), labels=LABELS), mask=Mask(keys=KEYS)),
}


def inputs(settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    lq = settings.get("queries", 40 - settings.get("mask", Mask()).q_start)
    shapes = [(2, 4, lq, 16), (2, 2, 40, 16), (2, 2, 40, 16)]
    return [torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def gradients(
    tensors: list[torch.Tensor], backend: str, settings: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    given = {name: value for name, value in settings.items() if name != "queries"}
    out = attention(*tensors, backend=backend, **given).out
    torch.manual_seed(1)
    target = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad((out * target).sum(), tensors)


@pytest.mark.parametrize("narrow", [3, spans.NARROW])
@pytest.mark.parametrize("name", CASES)
def test_by_vendor_calls(name: str, narrow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spans.states.__kwdefaults__, "narrow", narrow)
    monkeypatch.setattr(route, "_FEW_ROWS", 8)
    monkeypatch.setattr(route, "_differentiable", None)  # chunks are not taken
    ours = gradients(inputs(CASES[name]), "streaming", CASES[name])
    want = gradients(inputs(CASES[name]), "reference", CASES[name])
    for got, right in zip(ours, want, strict=True):
        torch.testing.assert_close(got, right)


ELSEWHERE = ("square", "padded", "whole", "prefix", "prefix padded", "static cache", "temper")


@pytest.mark.parametrize("name", [*ELSEWHERE, "gain"])
def test_by_pytorch_s_own_call_where_none_is_wired(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the public call, and nothing between it and its backward pass."""
    monkeypatch.setattr(vendor, "WIRED", ())
    monkeypatch.setattr(route, "_differentiable", None)
    ours = gradients(inputs(CASES[name]), "streaming", CASES[name])
    want = gradients(inputs(CASES[name]), "reference", CASES[name])
    for got, right in zip(ours, want, strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 4e-2), (torch.float16, 4e-3)])
def test_half_precision(dtype: torch.dtype, most: float) -> None:
    """The log-sum-exp's gradient keeps its digits in two columns of 16 bits."""
    settings = CASES["ACT sinks prefix"]
    ours = gradients(inputs(settings, dtype), "streaming", settings)
    want = gradients(inputs(settings), "reference", settings)
    for got, right in zip(ours, want, strict=True):
        assert float((got - right).norm() / right.norm()) < most


@pytest.mark.parametrize("causal", [True, False])
def test_the_log_sum_exp_has_its_gradient(causal: bool) -> None:
    results = []
    for backend in ("streaming", "reference"):
        tensors = inputs({})
        result = attention(*tensors, mask=Mask(causal=causal), backend=backend)
        torch.manual_seed(2)
        loss = (result.lse * torch.randn(2, 4, 40)).sum() + result.out.square().sum()
        results.append(torch.autograd.grad(loss, tensors))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right)


def test_parameters_of_a_rule_have_theirs() -> None:
    results = []
    for backend in ("streaming", "reference"):
        keep = torch.tensor([[1.0, 0.3]], dtype=torch.float64, requires_grad=True)
        sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        steer = Steer(rule=replace(act(), keep=keep), spans=((0, 3, 1),))
        tensors = inputs({})
        out = attention(*tensors, steer=steer, sinks=sinks, backend=backend).out
        results.append(torch.autograd.grad(out.square().sum(), [*tensors, keep, sinks]))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right)


LONG = 2048


@pytest.mark.parametrize("wired", [True, False])
@pytest.mark.parametrize("name", ["square", "padded", "prefix", "ACT"])
def test_nothing_as_large_as_queries_times_keys(
    wired: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not wired and name == "ACT":
        pytest.skip("what is merged needs a log-sum-exp")
    monkeypatch.setattr(vendor, "WIRED", ("cpu",) if wired else ())
    mask = {
        "padded": Mask(keys=torch.arange(LONG)[None] > 5),
        "prefix": Mask(q_start=LONG // 4),
    }.get(name, Mask())
    q = torch.randn(1, 2, LONG - mask.q_start, 8, requires_grad=True)
    k, v = (torch.randn(1, 1, LONG, 8, requires_grad=True) for _ in "kv")
    steer = Steer(rule=act(), spans=((0, 1, 1),)) if name == "ACT" else None
    with Ledger() as ledger:
        out = attention(q, k, v, mask=mask, steer=steer, request=Request(lse=False)).out
        out.sum().backward()
    assert ledger.widest <= 40 * LONG  # rows times (d and the columns beside it) of two heads
    assert ledger.ops["_scaled_dot_product_flash_attention_for_cpu_backward"] >= 1


def test_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs({})
    assert "chunked" not in explain(q, k, v, steer=CASES["ACT"]["steer"])
    monkeypatch.setattr(vendor, "WIRED", ())
    assert "own backward" in explain(q, k, v)
    with torch.no_grad():
        assert "chunked" in explain(q, k, v)


def test_what_the_public_call_does_not_do_is_left_to_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vendor, "WIRED", ())
    refused = ("sinks", "ACT", "bias", "scattered")
    for name in refused:
        tensors = inputs(CASES[name])
        assert "chunked" in explain(*tensors, **CASES[name])
        for got, right in zip(
            gradients(tensors, "streaming", CASES[name]),
            gradients(inputs(CASES[name]), "reference", CASES[name]),
            strict=True,
        ):
            torch.testing.assert_close(got, right)
    q, k, v = inputs({})
    few = attention(q[:, :, :5], k, v, mask=Mask(q_start=35))
    assert "chunked" in explain(q[:, :, :5], k, v, mask=Mask(q_start=35))
    assert few.out.requires_grad
    assert flash_gradients.FUSED is not None
