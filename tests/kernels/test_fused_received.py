"""interp_kernels.fused.received against the reference in float64: every mask, question, layout and
tile size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from loose import received, reference_attention

from interp_kernels import Mask, Received, Request, reference
from interp_kernels.fused import received as module
from interp_kernels.fused import received_kernel
from interp_kernels.fused.primitives import INTERPRETED
from interp_kernels.fused.received import Config, member_blocks, sampled_blocks
from interp_kernels.steer import Steer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, torch.float16)
#: Relative to max(1, expected). Products of half-precision numbers are exact in float32, so they
#: get no more; a GPU's tensor cores add less carefully than a CPU.
TOLERANCE = 1e-4 if DEVICE == "cuda" else 1e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """Thousands of tiny operations: a second thread only waits at barriers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def tiles(keys: int, queries: int, programs: int = 1) -> Iterator[None]:
    """Other tiles inside; more programs share out heads and queries."""
    before = module.config
    module.config = lambda *_: Config(keys, queries, 4, 2, programs)
    try:
        yield
    finally:
        module.config = before


def tensors(
    batch: int,
    heads: int,
    kv_heads: int,
    lq: int,
    lk: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layout: str = "plain",
) -> tuple[Tensor, Tensor]:
    """q (batch, heads, lq, d) and k (batch, kv_heads, lk, d), in a layout that need not be
    contiguous."""
    gen = torch.Generator().manual_seed(seed)

    def make(h: int, n: int) -> Tensor:
        x = torch.randn(batch, n, h, d, generator=gen).to(DEVICE, dtype)
        if layout == "model":  # (batch, length, heads, d) as a projection leaves it
            return x.transpose(1, 2)
        if layout == "strided":  # every second number of a longer row, every second row
            return (
                x.transpose(1, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)[:, :, ::2, ::2]
            )
        return x.transpose(1, 2).contiguous()

    return make(heads, lq), make(kv_heads, lk)


def check(
    q: Tensor,
    k: Tensor,
    question: Received,
    mask: Mask,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    temper: Tensor | None = None,
    bias: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Compares with the reference in float64; the answer."""
    scale = q.shape[3] ** -0.5
    found = reference_attention(
        q.double(),
        k.double(),
        k.double(),
        mask=mask,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        request=Request(received={"x": question}),
        steer=Steer(temper=temper, bias=bias),
    )
    answer, count = received(
        q,
        k,
        found.lse.float(),
        question,
        mask=mask,
        scale=scale,
        softcap=softcap,
        temper=temper,
        bias=bias,
    )
    expected = found.stats["received:x"]
    assert answer.shape == expected.shape and answer.dtype == torch.float32
    error = (answer - expected).abs() / expected.abs().clamp_min(1)
    assert answer.isfinite().all() and (error.max() < tolerance if error.numel() else True)
    torch.testing.assert_close(count, found.stats["received_count:x"])
    return answer


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A random call of any kind."""
    seed = draw(st.integers(0, 10**6))
    gen = torch.Generator().manual_seed(seed)
    batch, kv_heads, group = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 4)),
    )
    heads = kv_heads * group
    kind = draw(
        st.sampled_from(
            ["square", "square", "cached", "decode", "rolled", "static", "early", "cross"]
        )
    )
    lq = 1 if kind == "decode" else draw(st.integers(1, 90))
    past = draw(st.integers(1, 50))
    window = draw(st.sampled_from([None, None, 1, 7, 40]))
    q_start, k_start, lk = 0, 0, lq
    if kind in ("cached", "decode"):
        q_start, lk = past, lq + past
    elif kind == "rolled":  # a sliding-window cache: column 0 stands at slot k_start
        window = window or 5
        q_start, k_start = past + window, past + 1
        lk = q_start + lq - k_start
    elif kind == "static":  # the cache has room after the last query
        lk = lq + past
    elif kind == "early":  # queries before the first key see nothing
        k_start, lk = min(past, 6), past
    elif kind == "cross":
        lk = past
    pads: dict[str, Tensor] = {}
    side = draw(st.sampled_from(["", "", "left", "right", "holes"]))
    if side:
        lengths = torch.randint(0, lk + 1, (batch, 1), generator=gen)
        column = torch.arange(lk)
        keys = {
            "left": column >= lengths,
            "right": column < lengths,
            "holes": torch.rand(batch, lk, generator=gen) > 0.3,
        }[side]
        real = keys if lk == lq else torch.rand(batch, lq, generator=gen) > 0.2
        pads = {"keys": keys.to(DEVICE), "queries": real.to(DEVICE)}
    rows: Tensor | None = None
    chosen = draw(st.sampled_from(["", "", "few", "blocks", "last", "none"]))
    if chosen == "few":
        rows = torch.rand(batch, lq, generator=gen) > 0.9
    elif chosen == "blocks":
        rows = sampled_blocks(batch, lq, 3, 16, gen)
    elif chosen:
        rows = (torch.arange(lq) >= (lq - 5 if chosen == "last" else lq)).expand(batch, lq)
    columns = None
    listed = draw(st.sampled_from(["", "", "shared", "per batch", "per head"]))
    if listed:
        shape = {"shared": (1, 1), "per batch": (batch, 1), "per head": (batch, heads)}[listed]
        columns = torch.randint(-1, lk, (*shape, draw(st.integers(1, 40))), generator=gen).to(
            DEVICE
        )
    extra: dict[str, Any] = {"softcap": draw(st.sampled_from([None, None, 1.5]))}
    if draw(st.integers(0, 2)) == 0:
        extra["sinks"] = torch.randn(heads, generator=gen).to(DEVICE)
    shared = draw(st.sampled_from([(1, 1), (batch, 1), (batch, heads)]))
    if draw(st.integers(0, 2)) == 0:
        extra["temper"] = (
            torch.rand(*shared, draw(st.sampled_from([1, lq])), generator=gen) * 2
        ).to(DEVICE)
    if draw(st.integers(0, 2)) == 0:
        bias = torch.randn(*shared, lk, generator=gen)
        hidden = draw(st.sampled_from([-math.inf, torch.finfo(torch.float32).min, -1e30]))
        extra["bias"] = bias.masked_fill(torch.rand(*shared, lk, generator=gen) > 0.8, hidden).to(
            DEVICE
        )
    q, k = tensors(
        batch,
        heads,
        kv_heads,
        lq,
        lk,
        draw(st.sampled_from([3, 16, 24])),
        draw(st.sampled_from([torch.float32, *HALF])),
        seed,
        draw(st.sampled_from(["plain", "model", "strided"])),
    )
    return {
        "q": q,
        "k": k,
        "question": Received(
            queries=None if rows is None else rows.to(DEVICE),
            band=draw(
                st.sampled_from([None, None, (0, 0), (3, 20), (-10, 10), (1, 10**9), (5, 2)])
            ),
            reduce=draw(st.sampled_from(["mean", "sum", "max"])),
            keys=columns,
        ),
        "mask": Mask(
            causal=kind != "cross" and draw(st.integers(0, 3)) > 0,
            window=window,
            q_start=q_start,
            k_start=k_start,
            **pads,
        ),
        **extra,
    }


@pytest.mark.slow
@given(
    case=cases(),
    size=st.sampled_from([(32, 32, 1), (32, 16, 1), (16, 32, 4), (64, 16, 50), (16, 64, 1)]),
)
@examples(70)
def test_anything(case: dict[str, Any], size: tuple[int, int, int]) -> None:
    with tiles(*size):
        check(**case)


@pytest.mark.parametrize("d", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_head_dims(d: int, dtype: torch.dtype) -> None:
    q, k = tensors(1, 2, 1, 37, 37, d, dtype, layout="model")
    check(q, k, Received(), Mask())


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 127, 150])
def test_lengths_with_the_default_tiles(length: int, reduce: Any) -> None:
    q, k = tensors(1, 3, 1, length, length, 16)
    check(q, k, Received(reduce=reduce), Mask())


@pytest.mark.parametrize("window", [1, 31, 32, 33, 63, 64, 95, 10**9])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_at_block_edges(window: int, causal: bool) -> None:
    q, k = tensors(1, 1, 1, 130, 130, 16)
    check(q, k, Received(), Mask(causal=causal, window=window))


@pytest.mark.parametrize("off", [0, 1, 31, 32, 33, 64, -1, -32, -40, 200])
def test_offsets_at_block_edges(off: int) -> None:
    q, k = tensors(1, 2, 2, 70, 100, 16)
    check(q, k, Received(band=(2, 70)), Mask(q_start=max(off, 0), k_start=max(-off, 0)))
    check(q, k, Received(reduce="sum"), Mask(q_start=max(off, 0), k_start=max(-off, 0)))


def test_all_of_a_row_or_key_unseen() -> None:
    q, k = tensors(2, 2, 1, 40, 40, 16)
    keys = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    keys[0] = False
    keys[1, :7] = False
    answer = check(q, k, Received(), Mask(keys=keys, queries=keys))
    assert (answer[0] == 0).all() and (answer[1, :, :7] == 0).all() and (answer[1, :, 7:] > 0).all()
    hidden = torch.full((1, 1, 40), -math.inf, device=DEVICE)
    assert (check(q, k, Received(), Mask(), bias=hidden) == 0).all()


def test_columns_sum_to_the_rows() -> None:
    q, k = tensors(1, 4, 2, 100, 100, 16, torch.bfloat16)
    answer = check(q, k, Received(reduce="sum"), Mask())
    torch.testing.assert_close(
        answer.sum(-1), torch.full((1, 4), 100.0, device=DEVICE), rtol=1e-5, atol=0
    )


def test_empty() -> None:
    q, k = tensors(1, 2, 1, 5, 0, 16)
    lse = torch.zeros(1, 2, 5, device=DEVICE)
    assert received(q, k, lse, Received(), mask=Mask(), scale=1.0)[0].shape == (1, 2, 0)
    q, k = tensors(1, 2, 1, 0, 5, 16)
    assert (received(q, k, lse[..., :0], Received(), mask=Mask(), scale=1.0)[0] == 0).all()
    check(
        *tensors(1, 2, 1, 5, 5, 16), Received(keys=torch.full((1, 1, 3), -1, device=DEVICE)), Mask()
    )


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_shared_out_over_programs(programs: int, reduce: Any) -> None:
    """Heads and query ranges go to more programs when there are few; the parts are joined
    afterwards."""
    q, k = tensors(1, 4, 2, 150, 150, 16)
    columns = torch.tensor([[[0, 3, 149, -1, 77]]], device=DEVICE)
    rows = torch.rand(1, 150, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.7
    with tiles(16, 16, programs):
        check(q, k, Received(keys=columns, reduce=reduce), Mask())
        check(q, k, Received(keys=columns, reduce=reduce, queries=rows), Mask())


def test_the_same_bits_every_time() -> None:
    q, k = tensors(1, 2, 1, 100, 100, 16)
    with tiles(32, 16, 50):
        answers = [check(q, k, Received(), Mask()) for _ in range(2)]
    assert torch.equal(*answers)


def test_rows_outside_the_set_may_hold_anything() -> None:
    q, k = tensors(2, 2, 1, 96, 96, 16)
    rows = torch.zeros(2, 96, dtype=torch.bool, device=DEVICE)
    rows[0, 40:47] = rows[1, 90:] = True
    lse = reference_attention(
        q.double(), k.double(), k.double(), mask=Mask(), scale=0.25
    ).lse.float()
    for reduce in ("mean", "sum", "max"):
        question = Received(queries=rows, reduce=reduce)  # type: ignore[arg-type]
        clean, _ = received(q, k, lse, question, mask=Mask(), scale=0.25)
        poison = q.masked_fill(~rows[:, None, :, None], math.nan)
        found, _ = received(
            poison, k, lse.masked_fill(~rows[:, None], math.nan), question, mask=Mask(), scale=0.25
        )
        assert torch.equal(found, clean) and clean.isfinite().all()


def visited(
    monkeypatch: pytest.MonkeyPatch, question: Received, mask: Mask = Mask(), length: int = 128
) -> int:
    """Tiles of 16 keys and 16 queries that are multiplied for one head."""
    count = 0
    dot = received_kernel.dot

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return dot(*args, **kwargs)

    q, k = tensors(1, 1, 1, length, length, 16)
    with monkeypatch.context() as patch, tiles(16, 16):
        patch.setattr(received_kernel, "dot", counted)
        check(q, k, question, mask)
    return count


@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter does")
def test_skips_what_nothing_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(1, 128, dtype=torch.bool)
    assert visited(monkeypatch, Received()) == 8 * 9 // 2
    assert visited(monkeypatch, Received(), Mask(causal=False)) == 64
    assert visited(monkeypatch, Received(), Mask(window=16)) == 8 + 7
    assert visited(monkeypatch, Received(band=(0, 0))) == 8
    assert visited(monkeypatch, Received(band=(33, 48))) == 6 + 5
    assert visited(monkeypatch, Received(queries=rows)) == 0
    assert (
        visited(monkeypatch, Received(queries=rows.index_fill(1, torch.tensor([120]), True))) == 8
    )
    assert (
        visited(monkeypatch, Received(queries=rows.index_fill(1, torch.tensor([0, 40, 41]), True)))
        == 1 + 3
    )
    assert visited(monkeypatch, Received(keys=torch.tensor([[[100, 97, 99]]]))) == 2


def test_member_blocks() -> None:
    rows = torch.zeros(2, 70, dtype=torch.bool, device=DEVICE)
    rows[0, [3, 33, 69]] = True
    blocks, before = member_blocks(rows, 16)
    assert blocks.tolist() == [[0, 2, 4, 0, 0], [0, 0, 0, 0, 0]]
    assert before.tolist() == [[0, 1, 1, 2, 2, 3], [0] * 6]


def test_sampled_blocks() -> None:
    gen = torch.Generator().manual_seed(0)
    rows = sampled_blocks(400, 21 * 4 - 1, 4, 4, gen)
    assert rows.shape == (400, 83)
    blocks = torch.nn.functional.pad(rows, (0, 1), value=False).view(400, 21, 4)
    assert (blocks[..., 0] == blocks[..., 1]).all() and (
        blocks[..., 1] == blocks[..., 2]
    ).all()  # whole blocks
    assert (blocks[:, :20, 0].view(400, 5, 4).sum(-1) == 1).all()  # one of every four
    assert (rows.float().mean(0) - 0.25).abs().max() < 0.1  # five standard deviations of 400 draws
    assert sampled_blocks(5, 30, 8, 64, gen).all()  # one block only
    assert (sampled_blocks(5, 100, 8, 50, gen).sum(1) == 50).all()  # fewer blocks than the share
    first, second = (
        sampled_blocks(1, 999, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_sampling_is_unbiased() -> None:
    """Over many draws the mean of share · sum is the full sum, and the mean is near the full
    mean."""
    draws, share = 300, 4
    q, k = tensors(1, 1, 1, 64, 64, 16)
    result = reference_attention(
        q, k, k, mask=Mask(), scale=0.25, request=Request(received={"x": Received()})
    )
    a = reference.weights(q, k, mask=Mask(), scale=0.25)[0, 0]
    rows = sampled_blocks(draws, 64, share, 4, torch.Generator().manual_seed(0)).to(DEVICE)
    sums = share * rows.float() @ a  # (draws, keys)
    spread = sums.std(0) / draws**0.5
    assert ((sums.mean(0) - a.sum(0)).abs() < 4.5 * spread + 1e-5).all()
    with tiles(64, 16):
        answer, count = received(
            q.expand(20, -1, -1, -1), k.expand(20, -1, -1, -1), result.lse.expand(20, -1, -1),
            Received(queries=rows[:20]), mask=Mask(), scale=0.25,
        )  # fmt: skip
    means = rows.float() @ a / (rows.float() @ (a > 0).float()).clamp_min(1)
    torch.testing.assert_close(answer[:, 0], means[:20], atol=TOLERANCE, rtol=TOLERANCE)
    full = result.stats["received:x"][
        0, 0, :32
    ]  # keys that many rows see: a mean of few would lean
    lean = (means[:, :32].mean(0) - full).abs()
    assert (lean < 4.5 * means[:, :32].std(0) / draws**0.5 + 0.05 * full).all() and (
        count[..., :32] > 0
    ).all()


def test_refuses() -> None:
    q, k = tensors(1, 2, 1, 4, 4, 16)
    lse = torch.zeros(1, 2, 4, device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        received(q.double(), k.double(), lse, Received(), mask=Mask(), scale=1.0)
    with pytest.raises(ValueError, match="528"):
        received(*tensors(1, 2, 1, 4, 4, 528), lse, Received(), mask=Mask(), scale=1.0)


def test_lists_of_any_integers() -> None:
    q, k = tensors(1, 2, 1, 40, 40, 16)
    columns = torch.tensor([[[5, -1, 39]]], device=DEVICE)
    lse = torch.zeros(1, 2, 40, device=DEVICE)
    long, short = (
        received(q, k, lse, Received(keys=columns.to(dtype)), mask=Mask(), scale=0.25)[0]
        for dtype in (torch.int64, torch.int32)
    )
    assert torch.equal(long, short)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_captures_in_a_cuda_graph() -> None:
    """Nothing waits for the device, row sets included: a replay follows new row sets and keys."""
    q, k = tensors(1, 4, 2, 150, 150, 64, torch.bfloat16)
    rows = torch.zeros(1, 150, dtype=torch.bool, device=DEVICE)
    columns = torch.zeros(1, 1, 4, dtype=torch.int64, device=DEVICE)
    lse = reference_attention(
        q.double(), k.double(), k.double(), mask=Mask(), scale=0.125
    ).lse.float()
    question = Received(queries=rows, keys=columns)

    def call() -> Tensor:
        return received(q, k, lse, question, mask=Mask(), scale=0.125)[0]

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = call()
    rows[:, 100:] = True
    columns.copy_(torch.tensor([[[0, 120, 7, -1]]]))
    graph.replay()
    assert torch.equal(answer, call()) and answer.abs().sum() > 0


def test_no_graph_is_recorded() -> None:
    q, k = tensors(1, 2, 1, 4, 4, 16)
    lse = torch.zeros(1, 2, 4, device=DEVICE, requires_grad=True)
    assert not received(q.requires_grad_(), k, lse, Received(), mask=Mask(), scale=1.0)[
        0
    ].requires_grad


@pytest.mark.slow
def test_operator_is_registered_properly() -> None:
    q, k = tensors(1, 2, 1, 40, 40, 16)
    lse = torch.zeros(1, 2, 64, device=DEVICE)
    columns = torch.arange(20, dtype=torch.int32, device=DEVICE)[None, None]
    blocks, before = member_blocks(torch.ones(1, 40, dtype=torch.bool, device=DEVICE), 32)
    keep = torch.ones(1, 40, dtype=torch.uint8, device=DEVICE)
    more = (None,) * 5  # dense, starts, labels, factors, blend
    numbers = (0, None, None, None, None, 0, 0.25, None, False, 2, 2, 32, 32, 4, 2)
    nothing: tuple[Any, ...] = (None,) * 6
    for optional in (nothing, (columns, keep, lse[:, :1, :40], lse[:, :, :40], blocks, before)):
        torch.library.opcheck(module._received, (q, k, lse, *optional, *more, *numbers))


def test_under_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(2, 4, 70, 64), torch.empty(2, 2, 90, 64)
        question = Received(
            keys=torch.zeros(2, 4, 7, dtype=torch.int64),
            queries=torch.ones(2, 70, dtype=torch.bool),
        )
        for asked, n in ((question, 7), (replace(question, keys=None, band=(0, 5)), 90)):
            answer, count = received(
                q, k, torch.empty(2, 4, 70), asked, mask=Mask(q_start=20), scale=1.0
            )
            assert answer.shape == (2, 4, n) and count.shape == (2, 1, 90)
