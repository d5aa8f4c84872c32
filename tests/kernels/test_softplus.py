"""Softplus attention against a plain definition, row by row; gradients; memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fused import examples
from test_kernels import NoSquare, make_case

from interp_kernels import Mask, softplus, softplus_attention
from interp_kernels.masking import Visibility


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def definition(q: Any, k: Any, v: Any, mask: Mask, power: float | None) -> np.ndarray:
    (batch, heads, lq, d), lk, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    every = slice(None)
    vis = Visibility(mask, batch, heads, lq, lk, q.device)
    seen = vis.visible(every, every, 0, lq, 0, lk).expand(batch, heads, -1, -1).numpy()
    unit = [x.numpy() / np.linalg.norm(x.numpy(), axis=-1, keepdims=True) for x in (q, k)]
    out = np.zeros((batch, heads, lq, v.shape[-1]))
    for b, h, i in np.ndindex(batch, heads, lq):
        keys = [j for j in range(lk) if seen[b, h, i, j]]
        n = len(keys)
        s = {}
        for j in keys:
            x = math.log(d) * math.log(n) * float(unit[0][b, h, i] @ unit[1][b, h // group, j])
            if mask.dense is not None and mask.dense.dtype != torch.bool:
                x += float(mask.dense[b % mask.dense.shape[0], h % mask.dense.shape[1], i, j])
            s[j] = math.log1p(math.exp(x))
        a = {j: x / sum(s.values()) for j, x in s.items()}
        if power is not None:
            r = {j: max(n * x - 1, 0.0) ** power if n >= 4 else 0.0 for j, x in a.items()}
            a = {j: x / sum(r.values()) if x else 0.0 for j, x in r.items()}
        for j, x in a.items():
            out[b, h, i] += x * v[b, h // group, j].numpy()
    return out


@examples(150)
@given(st.data())
def test_is_the_definition(data: Any) -> None:
    (q, k, v), kwargs = make_case(data.draw, torch.float64, 14)
    mask, heads = kwargs["mask"], q.shape[1]
    if mask.window is not None:
        mask = replace(mask, keep_first=data.draw(st.sampled_from([0, 3])))
    power = data.draw(st.sampled_from([None, 1.0, 3.0, 15.0]))
    chosen = data.draw(st.one_of(st.none(), st.lists(st.integers(0, heads - 1), max_size=3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softplus, "_BUDGET", data.draw(st.sampled_from([1, 300, 1 << 22])))
        got = softplus_attention(q, k, v, mask=mask, power=power, heads=chosen)
    want = definition(q, k, v, mask, power)
    np.testing.assert_allclose(got.numpy(), want if chosen is None else want[:, chosen], atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("power", [None, 3.0, 15.0])
def test_gradcheck(power: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softplus, "_MAX_ROWS", 3)
    torch.manual_seed(0)
    shapes = ((2, 2, 8, 5), (2, 1, 8, 5), (2, 1, 8, 3))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = Mask(keys=torch.arange(8) >= torch.tensor([[0], [2]]))
    assert torch.autograd.gradcheck(
        lambda *x: softplus_attention(*x, mask=mask, power=power), leaves
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_rows_and_large_powers(dtype: torch.dtype) -> None:
    """The first three rows are 0; a power of 15 overflows nowhere; uniform rows are 0 too, not
    their rounding."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 700, 16).to(dtype) for h in (4, 2, 2))
    k[:, :, 300] = 100 * q[:, ::2, 650]  # one key far above the rest
    for power in (3.0, 15.0):
        out = softplus_attention(q, k, v, power=power)
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert not out[:, :, :3].any()
        assert out[:, :, 3:].any(-1).all()
        wide = softplus_attention(q.double(), k.double(), v.double(), power=power)
        torch.testing.assert_close(out.double(), wide, atol=2e-2, rtol=2e-2)
    assert not softplus_attention(q, torch.ones_like(k), v).any()


def test_no_square_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2048
    q, k, v = (torch.randn(1, 1, size, 8, requires_grad=True) for _ in range(3))
    monkeypatch.setattr(softplus, "_BUDGET", size * size // 16)
    with NoSquare(size * size // 4):
        softplus_attention(q, k, v).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_edges_and_errors() -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    assert softplus_attention(q[:, :, :0], k, k).shape == (2, 4, 0, 8)
    assert not softplus_attention(q, k[:, :, :0], k[:, :, :0]).any()
    assert softplus_attention(q, k, k, heads=[]).shape == (2, 0, 6, 8)
    for change, word in (
        (dict(power=0.5), "power"),
        (dict(heads=[4]), "heads"),
        (dict(k=k[:, :, :5]), "Shapes"),
        (dict(q=q[:, :3]), "evenly"),
        (dict(mask=Mask(keys=torch.ones(2, 5, dtype=torch.bool))), "mask.keys"),
    ):
        with pytest.raises(ValueError, match=word):
            softplus_attention(**{"q": q, "k": k, "v": k, **change})
