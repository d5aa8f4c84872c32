"""Attention to lists of keys, and the search that makes them, against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interp_kernels import KeyLists, attend_listed, tree_search


def definition(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """softmax over the keys seen, in float64; 0 where none is."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double()
    logits = q @ k.mT * q.shape[3] ** -0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, -math.inf)
    if sinks is not None:
        extra = sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], 3)
    weights = logits.softmax(3).nan_to_num(0.0)[..., : k.shape[2]]
    return weights @ v.repeat_interleave(group, 1)


def laid_out(x: Tensor, kind: int) -> Tensor:
    """The same tensor side by side, a projection's, a part of a static cache, or by columns."""
    if kind == 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 2:
        room = x.new_full((x.shape[0], x.shape[1], x.shape[2] + 3, x.shape[3]), math.nan)
        room[:, :, : x.shape[2]] = x
        return room[:, :, : x.shape[2]]
    return x.mT.contiguous().mT if kind == 3 else x


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_attention_to_lists(data: st.DataObject) -> None:
    draw = data.draw
    batch, kv_heads, group = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )
    blocks, rows, n = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    d, d_v, m = (
        draw(st.sampled_from([4, 7])),
        draw(st.sampled_from([4, 5])),
        draw(st.integers(1, n)),
    )
    heads = kv_heads * group
    listing = draw(st.sampled_from([heads, kv_heads]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    q = torch.randn(batch, heads, blocks * rows, d, generator=g)
    k, v = (torch.randn(batch, kv_heads, n, e, generator=g) for e in (d, d_v))
    own = draw(st.sampled_from([1, batch]))
    order = torch.rand(own, listing, blocks, n, generator=g).argsort(3)
    columns = order[..., :m]
    masked = draw(st.integers(0, m))
    shown = torch.rand(batch, listing, blocks, rows, masked, generator=g) < 0.7
    softcap = draw(st.sampled_from([None, 2.0]))
    sinks = draw(st.sampled_from([None, torch.randn(heads, generator=g)]))
    before = torch.ones(batch, listing, blocks, rows, m - masked, dtype=torch.bool)
    every = torch.cat([before, shown], 4)
    if m == masked:  # an index below 0 is none
        gone = torch.rand(columns.shape, generator=g) < 0.2
        columns = columns.masked_fill(gone, -1)
        every = every & ~gone[:, :, :, None]
        shown = every
    seen = torch.zeros(batch, listing, blocks, rows, n, dtype=torch.bool)
    at = columns.clamp_min(0)[:, :, :, None].expand(every.shape)
    seen.scatter_reduce_(4, at, every, "amax")
    seen = seen.flatten(2, 3).repeat_interleave(heads // listing, 1)
    k, v = laid_out(k, draw(st.integers(0, 3))), laid_out(v, draw(st.integers(0, 3)))
    lists = KeyLists(columns, shown)
    found = attend_listed(q, k, v, lists, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(
        found.double(), definition(q, k, v, seen, softcap, sinks), atol=2e-5, rtol=1e-4
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4).map(sorted),
    st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_the_search_by_its_definition(
    ends: list[int], count: int, size: int, rows: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, len(ends), rows, 3, generator=g)
    k = torch.randn(2, 2, 60, 3, generator=g)
    low, high = tree_search(q, k, ends, count, size)
    for b in range(2):
        for h in range(4):
            for i, end in enumerate(ends):
                key = k[b, h // 2]
                ranges = [(j * end // count, (j + 1) * end // count) for j in range(count)]
                widest = math.ceil(end / count)
                while widest > size:
                    widest = math.ceil(widest / 2)
                    halves = [(a, (a + z + 1) // 2) for a, z in ranges]
                    halves += [((a + z + 1) // 2, z) for a, z in ranges]
                    scores = {
                        (a, z): float((q[b, h, i] @ key[(a + z) // 2]).max())
                        for a, z in halves
                        if a < z
                    }
                    ranges = sorted(scores, key=lambda one: -scores[one])[:count]
                wanted = {c for a, z in ranges for c in range(a, z)}
                found = {
                    c
                    for a, z in zip(low[b, h, i].tolist(), high[b, h, i].tolist(), strict=True)
                    for c in range(a, z)
                }
                assert found == wanted
                if end <= count * size:
                    assert found == set(range(end))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes anew."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)]
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, out.numel())
        return out


def test_some_heads_read_keys_where_they_lie() -> None:
    """Lists say which kv head they read, and no more than the listed rows is copied, of a static
    cache or of keys that a projection left side by side with its heads."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, 8, generator=g)
    read = torch.tensor([1, 0, 1])
    columns = torch.rand(1, 3, 2, 500, generator=g).argsort(3)[..., :6]
    seen = torch.zeros(1, 3, 2, 2, 500, dtype=torch.bool)
    at = columns[:, :, :, None].expand(-1, -1, -1, 2, -1)
    seen = seen.scatter_(4, at, True).flatten(2, 3).expand(2, -1, -1, -1)
    full = torch.randn(2, 2, 500, 8, generator=g)
    for kind in (0, 1, 2):
        k = laid_out(full, kind)
        lists = KeyLists(columns, torch.ones(1, 1, 1, 1, 0, dtype=torch.bool), read)
        with Largest() as largest:
            found = attend_listed(q, k, k, lists)
        assert largest.elements <= 2 * 3 * 2 * 6 * 8
        wanted = definition(q, full[:, read], full[:, read], seen, None, None)
        torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=1e-4)
    blocks = q.unflatten(2, (2, 2))
    for low, wanted in zip(
        tree_search(blocks, full, [300, 500], 4, 2, kv_heads=read),
        tree_search(blocks, full[:, read], [300, 500], 4, 2),
        strict=True,
    ):
        assert torch.equal(low, wanted)


def test_a_column_outside_the_keys_is_none() -> None:
    q = k = torch.ones(1, 1, 1, 2)
    v = torch.tensor([[[[3.0]]]])
    lists = KeyLists(torch.tensor([[[[-1, 0, 7]]]]), torch.tensor(True))
    assert attend_listed(q, k, v, lists).item() == 3
    lists = KeyLists(torch.tensor([[[[-1, 7]]]]), torch.tensor(True))
    assert attend_listed(q, k, v, lists).item() == 0


def test_nothing_listed_and_nobody_asking() -> None:
    q, k = torch.ones(1, 2, 4, 2), torch.ones(1, 1, 3, 2)
    shown = torch.tensor(True)
    none = KeyLists(torch.zeros(1, 1, 2, 0, dtype=torch.int64), shown)
    assert torch.equal(attend_listed(q, k, k, none), torch.zeros(1, 2, 4, 2))
    empty = KeyLists(torch.zeros(1, 1, 0, 3, dtype=torch.int64), shown)
    assert attend_listed(q[:, :, :0], k, k, empty).shape == (1, 2, 0, 2)
    low, high = tree_search(torch.ones(1, 2, 0, 1, 2), k, [], 2, 1)
    assert low.shape == high.shape == (1, 2, 0, 2)


def test_what_does_not_fit_is_refused() -> None:
    q, k = torch.zeros(1, 4, 6, 2), torch.zeros(1, 2, 3, 2)
    shown = torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)

    def lists(heads: int, blocks: int, kv_heads: Tensor | None = None, n: int = 1) -> KeyLists:
        columns = torch.zeros(1, heads, blocks, 1, dtype=torch.int64)
        return KeyLists(columns, shown.expand(1, 1, 1, 1, n), kv_heads)

    with pytest.raises(ValueError, match="3 heads"):
        attend_listed(q, k, k, lists(3, 2))
    with pytest.raises(ValueError, match="4 heads"):
        attend_listed(q, k, k, lists(4, 2, torch.tensor([0])))
    with pytest.raises(ValueError, match="2 columns"):
        attend_listed(q, k, k, lists(4, 2, n=2))
    for blocks in (0, 4):
        with pytest.raises(ValueError, match="evenly"):
            attend_listed(q, k, k, lists(2, blocks))
    with pytest.raises(ValueError, match="gradient"):
        attend_listed(q.requires_grad_(), k, k, lists(2, 2))
    blocks = q.detach().unflatten(2, (2, 3))
    for ends, count, size in (([1], 1, 1), ([1, 2], 0, 1), ([1, 2], 1, 0)):
        with pytest.raises(ValueError, match="an end a block"):
            tree_search(blocks, k, ends, count, size)
    for ends in ([1, 4], [-1, 2]):
        with pytest.raises(ValueError, match="3 keys"):
            tree_search(blocks, k, ends, 1, 1)
    with pytest.raises(ValueError, match="3 kv heads"):
        tree_search(blocks, torch.zeros(1, 3, 3, 2), [1, 2], 1, 1)
