"""Attention received, where no output is wanted (ACT's question): products of queries and keys
alone, and of the rows that are counted alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from interp_kernels import Mask, Received, Request, Steer, attention
from interp_kernels.fused import backend

L, D, HEADS = 1024, 64, 4


def tensors(values: float = 1.0) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(1, HEADS, L, D), torch.randn(1, 2, L, D)
    return [q, k, torch.full((1, 2, L, D), values)]


def sampled(share: int, block: int = 64) -> torch.Tensor:
    """(1, L): the first of every `share` blocks of queries."""
    return ((torch.arange(L) // block) % share == 0)[None]


def flops(request: Request) -> int:
    with FlopCounterMode(display=False) as counter:
        attention(*tensors(), request=request, backend="streaming")
    return int(counter.get_total_flops())


def test_values_are_left_alone() -> None:
    asked = Request(received={"act": Received()}, out=False, lse=False)
    whole = 2 * HEADS * D * L * L // 2  # QKᵀ of the causal half
    # the squares on the diagonal are whole, and the rows' weights are added up by a product
    assert flops(asked) <= whole * 1.15 + 2 * HEADS * L * L // 2 * 1.15
    broken = attention(*tensors(float("nan")), request=asked, backend="streaming")
    assert broken.stats["received:act"].isfinite().all()


@pytest.mark.parametrize("share", [4, 8])
def test_rows_that_are_not_counted_are_left_out(share: int) -> None:
    every = Request(received={"act": Received(reduce="sum")}, out=False, lse=False)
    some = Request(received={"act": Received(sampled(share), reduce="sum")}, out=False, lse=False)
    assert flops(some) <= 1.1 / share * flops(every)
    asked = Request(received=some.received)
    got = attention(*tensors(), request=some, backend="streaming").stats["received:act"]
    want = attention(*tensors(), request=asked, backend="reference").stats["received:act"]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "mask",
    [Mask(), Mask(window=90), Mask(causal=False), Mask(queries=torch.arange(L)[None] > 200)],
)
def test_any_rows_and_any_mask(mask: Mask) -> None:
    """Several sets, single rows and none at all."""
    torch.manual_seed(1)
    sets = [torch.rand(1, L) < 0.01, torch.arange(L)[None] == 777, torch.zeros(1, L).bool()]
    asked = {str(i): Received(one, reduce="mean") for i, one in enumerate(sets)}
    got = attention(
        *tensors(), mask=mask, request=Request(received=asked, out=False, lse=False),
        backend="streaming",
    ).stats  # fmt: skip
    want = attention(*tensors(), mask=mask, request=Request(received=asked), backend="reference")
    for name, value in want.stats.items():
        torch.testing.assert_close(got[name], value.to(got[name]), atol=1e-5, rtol=1e-4)


def test_what_else_is_asked_is_of_all_rows() -> None:
    asked = Request(
        frozenset({"max"}), received={"one": Received(sampled(8))}, out=False, lse=False
    )
    got = attention(*tensors(), request=asked, backend="streaming").stats["max"]
    want = attention(*tensors(), request=asked, backend="reference").stats["max"]
    torch.testing.assert_close(got, want)
    asked = Request(received={"one": Received(sampled(8))}, out=False)
    assert attention(*tensors(), request=asked, backend="streaming").lse.isfinite().all()


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("steer", [None, Steer(temper=torch.full((1, HEADS, 1), 0.5))])
def test_the_kernels_read_few_values(
    rows: int, steer: Steer | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least that a product of tiles takes, and what they are does not matter."""
    torch.manual_seed(2)
    q, k = torch.randn(1, HEADS, rows, D), torch.randn(1, 2, 40, D)
    read = []
    for name in ("forward", "decode"):
        own = getattr(backend, name)

        def noted(call: Any, *args: Any, own: Any = own, **more: Any) -> Any:
            read.append(call.v.shape[3])
            return own(call, *args, **more)

        monkeypatch.setattr(backend, name, noted)
    asked = Request(frozenset({"entropy"}), received={"act": Received()}, out=False)
    settings: Any = dict(mask=Mask(q_start=40 - rows), request=asked, steer=steer)
    for _ in range(2):  # a second step, which a plan would serve
        got = attention(q, k, torch.randn(1, 2, 40, D), backend="triton", **settings)
    want = attention(q, k, torch.zeros(1, 2, 40, D), backend="reference", **settings)
    assert read == [16, 16] and got.out.shape == (1, HEADS, rows, 0)
    torch.testing.assert_close(got.lse, want.lse.float(), atol=1e-4, rtol=1e-4)
    for name, value in want.stats.items():
        torch.testing.assert_close(got.stats[name], value.to(got.stats[name]), atol=1e-4, rtol=1e-3)
