"""A sliding window that keeps the first tokens: against the same visibility by loops, as a dense
mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fused import DEVICE, examples, there
from test_kernels import NoSquare, assert_same, make_case
from test_steer import make_steer

from interp_kernels import Mask, Received, attention, explain
from interp_kernels.masking import Visibility
from interp_kernels.reference import weights
from interp_kernels.streaming import chunked


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loops(mask: Mask, batch: int, lq: int, lk: int) -> torch.Tensor:
    """(batch, 1, queries, keys) bool by the definition, one pair at a time; the dense mask
    aside."""
    seen = np.zeros((batch, 1, lq, lk), dtype=bool)
    for b, i, j in np.ndindex(batch, lq, lk):
        x, y = mask.q_start + i, mask.k_start + j
        start = 0 if mask.starts is None else int(mask.starts[b])
        near = (
            mask.window is None or abs(x - y) < mask.window or start <= y < start + mask.keep_first
        )
        seen[b, 0, i, j] = (
            near and (y <= x or not mask.causal) and (mask.keys is None or bool(mask.keys[b, j]))
        )
    return torch.from_numpy(seen)


def make(draw: Any, largest: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    tensors, kwargs = make_case(draw, torch.float64, largest)
    mask, (batch, _, lk, _) = kwargs["mask"], tensors[1].shape
    starts = None
    if mask.keys is not None and draw(st.booleans()):
        starts = mask.keys.int().argmax(1) + mask.k_start  # as left padding has it
    elif draw(st.booleans()):
        starts = torch.tensor([draw(st.integers(-3, mask.k_start + lk + 2)) for _ in range(batch)])
    window = mask.window or draw(st.sampled_from([None, 2, 6]))
    kwargs["mask"] = replace(mask, window=window, keep_first=draw(st.integers(0, 5)), starts=starts)
    return tensors, kwargs


@pytest.mark.slow
@examples(300)
@given(st.data())
def test_is_the_definition(data: Any) -> None:
    (q, k, v), kwargs = make(data.draw, 30)
    mask: Mask = kwargs["mask"]
    (batch, heads, lq, _), lk = q.shape, k.shape[2]
    if data.draw(st.booleans()) and not kwargs.get("request"):
        kwargs["steer"] = make_steer(data.draw, q, k, softmax=True)
    seen = loops(mask, batch, lq, lk)
    dense = seen
    if mask.dense is not None:
        dense = (
            seen & mask.dense
            if mask.dense.dtype == torch.bool
            else mask.dense.masked_fill(~seen, -torch.inf)
        )
    plain = replace(
        mask, causal=False, window=None, keep_first=0, starts=None, keys=None, dense=dense
    )
    want = attention(q, k, v, backend="reference", **{**kwargs, "mask": plain})
    a = weights(q, k, **{n: x for n, x in kwargs.items() if n != "request"})
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr(chunked, "_BUDGET", data.draw(st.sampled_from([50, 400, 2000])))
            patch.setattr(chunked, "_MIN_ROWS", 3)
            patch.setattr(chunked, "_MAX_ROWS", 7)
        for name in ("reference", "streaming"):
            got = attention(q, k, v, backend=name, **kwargs)
            for key, value in got.stats.items():  # a mask that differs by head counts by head
                if key.startswith("received_count"):
                    got.stats[key] = value.expand_as(want.stats[key])
            assert_same(got, want, a, 1e-9, kwargs.get("request"))
    vis = Visibility(replace(mask, dense=None), batch, heads, lq, lk, q.device)
    assert torch.equal(vis.row_counts(), seen[:, 0].sum(-1))
    rows = torch.ones(batch, lq, dtype=torch.bool) if mask.queries is None else mask.queries
    for band in (None, (1, 4), (-3, 40)):
        counted = seen[:, 0] & rows[..., None]
        if band is not None:
            gap = torch.arange(lq)[:, None] + mask.q_start - torch.arange(lk) - mask.k_start
            counted = counted & (gap >= band[0]) & (gap <= band[1])
        assert torch.equal(vis.key_counts(Received(band=band))[:, 0], counted.sum(-2))


@pytest.mark.parametrize("rows", [1, 4, 30])
def test_no_row_is_forgotten_by_the_spans(rows: int) -> None:
    """Every visible pair lies inside the columns of its chunk of rows."""
    for mask in (
        Mask(window=4, keep_first=3),
        Mask(window=4, keep_first=3, q_start=9, k_start=2, starts=torch.tensor([1, 5])),
        Mask(False, window=4, keep_first=3, starts=torch.tensor([20, 27])),
    ):
        seen, vis = loops(mask, 2, 30, 32), Visibility(mask, 2, 1, 30, 32, torch.device("cpu"))
        for r0 in range(0, 30, rows):
            c0, c1 = vis.span(r0, min(r0 + rows, 30))
            assert not seen[:, :, r0 : r0 + rows, :c0].any()
            assert not seen[:, :, r0 : r0 + rows, c1:].any()


def test_streaming_llm_decodes_alike() -> None:
    """A step over a whole cache sees the first four and the last eight keys."""
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    got = attention(q, k, v, mask=Mask(window=8, keep_first=4, q_start=39)).out
    held = [*range(4), *range(32, 40)]
    want = attention(q, k[:, :, held], v[:, :, held], mask=Mask(causal=False)).out
    torch.testing.assert_close(got, want)


def test_who_serves_it() -> None:
    q, k, v = there(tuple(torch.randn(2, h, 40, 16) for h in (4, 2, 2)))
    mask = Mask(window=8, keep_first=2, starts=torch.tensor([0, 3], device=DEVICE))
    assert "kept beyond it" in explain(q, k, v, mask=mask, backend="streaming")
    assert "kept beyond it" in explain(q, k, v, mask=mask, backend="triton")
    for wide in (
        replace(mask, window=None),
        replace(mask, window=40),
    ):  # a window that hides nothing keeps nothing
        got = attention(q, k, v, mask=wide, backend="triton").out
        torch.testing.assert_close(
            got, attention(q, k, v, backend="reference").out, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(keep_first=-1), "keep_first"),
        (dict(starts=torch.tensor([1, 2, 3])), "mask.starts has shape"),
        (dict(starts=torch.tensor([1.0])), "integers"),
    ],
)
def test_bad_masks_are_named(change: dict[str, Any], word: str) -> None:
    q = torch.randn(1, 1, 5, 4)
    with pytest.raises(ValueError, match=word):
        attention(q, q, q, mask=Mask(window=2, **change))


def test_no_square_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2048
    q, k, v = (torch.randn(1, 1, size, 8) for _ in range(3))
    monkeypatch.setattr(chunked, "_BUDGET", size * size // 8)
    with NoSquare(size * size // 4):
        attention(q, k, v, mask=Mask(window=64, keep_first=4, starts=torch.tensor([5])))
