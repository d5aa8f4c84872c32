"""Edits in half precision are what they are in float64: −inf and finfo.min hide a key, and no
0 · inf becomes NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loose import forward

from interp_kernels import Mask, Received, Request, Rule, Steer, attention
from interp_kernels.request import ROW

Tensor = torch.Tensor

HALF = (torch.float16, torch.bfloat16)
REQUEST = Request(
    frozenset(ROW) - {"pair_mass"},
    torch.arange(23)[None] % 3,
    3,
    received={"all": Received(), "peak": Received(reduce="max")},
    topk=2,
)


def case(dtype: torch.dtype, hidden: float, lq: int = 23) -> tuple[list[Tensor], Tensor, Mask]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 16).to(dtype) for h, n in ((2, lq), (1, 23), (1, 23)))
    bias = torch.randn(1, 2, 23).to(dtype)
    # of the first head the first four keys, so that its first rows see nothing
    bias[0, 0, :4], bias[0, 1, 2::5] = hidden, hidden
    return [q, k, v], bias, Mask(q_start=23 - lq)


def wide(tensors: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("lq", [23, 3])
@pytest.mark.parametrize("backend", ["triton", "streaming"])
def test_a_bias_that_hides(dtype: torch.dtype, lowest: bool, lq: int, backend: str) -> None:
    hidden = torch.finfo(dtype).min if lowest else -math.inf
    tensors, bias, mask = case(dtype, hidden, lq)
    exact = bias.double().masked_fill(bias == hidden, -math.inf)
    got = attention(*tensors, mask=mask, request=REQUEST, steer=Steer(bias=bias), backend=backend)
    want = attention(
        *wide(tensors), mask=mask, request=REQUEST, steer=Steer(bias=exact), backend="reference"
    )
    torch.testing.assert_close(got.out.double(), want.out, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(got.lse.double(), want.lse, atol=1e-4, rtol=1e-4)
    for name, value in want.stats.items():
        close = 0.02 if "distance" in name else 1e-3
        torch.testing.assert_close(got.stats[name].double(), value.double(), atol=close, rtol=1e-3)


@pytest.mark.parametrize("lowest", [False, True])
def test_the_kernel_itself(lowest: bool) -> None:
    """Whatever it is called by: float16, where −1e30 is −inf."""
    hidden = torch.finfo(torch.float16).min if lowest else -math.inf
    tensors, bias, mask = case(torch.float16, hidden)
    exact = Steer(bias=bias.double().masked_fill(bias == hidden, -math.inf))
    state = forward(*tensors, mask=mask, steer=Steer(bias=bias), names=["entropy", "argmax"])
    want = attention(
        *wide(tensors),
        mask=mask,
        request=Request(frozenset({"entropy", "argmax"})),
        steer=exact,
        backend="reference",
    )
    torch.testing.assert_close(state.lse.double(), want.lse, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        state.stats["entropy"].double(), want.stats["entropy"], atol=1e-3, rtol=1e-3
    )
    assert torch.equal(state.stats["argmax"] < 0, want.stats["argmax"] < 0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("lq", [23, 3])
def test_every_other_tensor_of_an_edit(dtype: torch.dtype, lq: int) -> None:
    """The numbers are the same in float32; what was rounded on the way there would differ."""
    tensors, _, mask = case(dtype, -math.inf, lq)
    gen = torch.Generator().manual_seed(1)

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=gen).to(dtype)

    edit: dict[str, Any] = dict(
        temper=some(1, 2, lq) + 0.5, gain=some(1, 2, lq), blend=some(2), bias=some(1, 2, 23)
    )
    rule = dict(
        keep=some(2, 2), receive=some(2, 2), tests=some(1, 2), bounds=torch.tensor([0.1]).to(dtype)
    )
    for part in (
        dict(edit),
        dict(spans=((0, 5, 1),)),
        dict(labels=torch.arange(23)[None, None] % 2),
    ):
        ruled = "bias" not in part
        half = Steer(**part, rule=Rule(**rule) if ruled else None)
        full = Steer(
            **{n: x.double() if n in edit else x for n, x in part.items()},
            rule=Rule(**{n: x.double() for n, x in rule.items()}) if ruled else None,
        )
        want = attention(*wide(tensors), mask=mask, steer=full, backend="reference")
        for backend in ("triton", "streaming"):
            for steer in (half, [half, Steer(gain=edit["gain"])]):
                got = attention(*tensors, mask=mask, steer=steer, backend=backend)
                scale = 1.0 if steer is half else edit["gain"].double()[..., None]
                torch.testing.assert_close(got.out.double(), want.out * scale, atol=1e-2, rtol=1e-2)
        fine = attention(*(x.float() for x in tensors), mask=mask, steer=half, backend="triton")
        torch.testing.assert_close(fine.out.double(), want.out, atol=1e-5, rtol=1e-5)


def test_several_biases_in_half_precision() -> None:
    """−40,000 twice is no −inf."""
    q, k, v = (torch.randn(1, 1, 9, 16) for _ in range(3))
    bias = torch.full((1, 1, 9), -30000.0).half()
    steers = [Steer(bias=bias), Steer(bias=bias), Steer(bias=bias)]
    for backend in ("triton", "streaming"):
        got = attention(q, k, v, steer=steers, backend=backend)
        torch.testing.assert_close(got.out, attention(q, k, v).out, atol=2e-2, rtol=2e-2)


def test_decode_and_forward_hide_alike() -> None:
    tensors, bias, mask = case(torch.float16, torch.finfo(torch.float16).min, 3)
    one = attention(*tensors, mask=mask, steer=Steer(bias=bias), backend="triton")
    two = forward(*tensors, mask=mask, steer=Steer(bias=bias))
    torch.testing.assert_close(one.lse, two.lse, atol=1e-4, rtol=1e-4)
