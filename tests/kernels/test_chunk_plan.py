"""The pass over all keys on a device whose operations are launches: few chunks, few launches in
each, and no more memory than its budget. Counted on meta tensors, which have shapes alone."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import Ledger

from interp_kernels import Mask, Received, Request, attention
from interp_kernels.call import prepare
from interp_kernels.masking import Visibility
from interp_kernels.streaming import chunk_plan, chunked

#: A layer of Llama-3-8B.
HEADS, KV_HEADS, D = 32, 8, 128
LONG = 131_072
NAMES = frozenset({"entropy", "max", "argmax", "distance", "capped_distance"})


def visibility(lq: int, lk: int, mask: Mask = Mask(), batch: int = 1) -> Visibility:
    return Visibility(mask, batch, HEADS, lq, lk, torch.device("meta"))


def chunks(
    vis: Visibility, sizes: chunk_plan.Sizes, kv_heads: int = KV_HEADS
) -> list[tuple[chunk_plan.Block, tuple]]:
    blocks, rows = chunk_plan.blocks_of(vis, kv_heads, sizes)
    cut = list(chunk_plan.chunks_of(vis, blocks[0].heads, rows, sizes))
    return [(block, one) for block in blocks for one in cut]


def test_a_layer_at_128k_is_a_few_hundred_chunks_and_not_131072() -> None:
    """No chunk is larger than 2 GiB, and there are hardly more than that allows for."""
    sizes = chunk_plan.device_sizes(LONG, torch.float32, 1)
    found = chunks(visibility(LONG, LONG), sizes)
    for block, (r0, r1, c0, c1) in found:
        assert 4 * block.heads * (r1 - r0) * (c1 - c0) <= 2 << 30
    least = 4 * HEADS * LONG * (LONG + 1) / 2 / (2 << 30)
    assert least <= len(found) <= 1.15 * least
    assert len(found) / KV_HEADS <= 72
    # each row of each head once
    assert sum(b.heads * (r1 - r0) for b, (r0, r1, _, _) in found) == HEADS * LONG


@pytest.mark.parametrize("length, at_most", [(512, 1), (4096, 4), (8192, 10), (32_768, 40)])
def test_shorter_texts_are_a_handful(length: int, at_most: int) -> None:
    sizes = chunk_plan.device_sizes(length, torch.float32, 1)
    assert len(chunks(visibility(length, length), sizes)) <= at_most


@pytest.mark.parametrize(
    "mask, lq, lk",
    [(Mask(window=4096), LONG, LONG), (Mask(q_start=LONG - 4096), 4096, LONG), (Mask(), 1, 1)],
)
def test_windows_and_cached_prefixes_are_cut_into_chunks_that_fit(
    mask: Mask, lq: int, lk: int
) -> None:
    sizes = chunk_plan.device_sizes(lq, torch.float32, 2)
    vis = visibility(lq, lk, mask)
    found = chunks(vis, sizes)
    rows = [(r0, r1) for block, (r0, r1, _, _) in found if not block.n0]
    assert [r for a, b in rows for r in (a, b)][1:-1] == [b for a, b in rows[:-1] for _ in "ab"]
    for block, (r0, r1, c0, c1) in found:
        assert (c0, c1) == vis.span(r0, r1)
        assert block.heads * (r1 - r0) * (c1 - c0) <= sizes.budget
    assert len(found) <= 150


@given(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 4)),
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
    st.tuples(st.integers(1, 3000), st.integers(1, 12), st.integers(0, 40), st.booleans()),
)
def test_any_sizes_cut_every_row_once(
    heads: tuple[int, int, int], lengths: tuple[int, int], limits: tuple[int, int, int, bool]
) -> None:
    """However small the budget: a row a chunk, and more than the least only where they fit."""
    (batch, kv_heads, group), (lq, lk), (budget, least, more, growing) = heads, lengths, limits
    sizes = chunk_plan.Sizes(budget, least, least + more, growing)
    vis = Visibility(Mask(), batch, kv_heads * group, lq, max(lq, lk), torch.device("meta"))
    blocks, rows = chunk_plan.blocks_of(vis, kv_heads, sizes)
    assert 1 <= rows <= lq
    assert sum(block.heads for block in blocks) == batch * kv_heads * group
    cut = list(islice(chunk_plan.chunks_of(vis, blocks[0].heads, rows, sizes), lq + 1))
    assert [r for r0, r1, _, _ in cut for r in range(r0, r1)] == list(range(lq))
    if not growing:
        assert rows <= least or blocks[0].heads * rows * vis.lk <= budget


def on_meta(length: int, request: Request, kv_heads: int = KV_HEADS) -> tuple[Ledger, int]:
    """What a call of that many tokens counts, and in how many chunks."""
    heads = kv_heads * HEADS // KV_HEADS
    q = torch.empty(1, heads, length, D, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, kv_heads, length, D, dtype=torch.bfloat16, device="meta")
    call = prepare(q, k, k, request=request)
    n = len(chunks(call.vis, chunked._sizes(call), kv_heads))
    with Ledger() as ledger:
        chunked.run_chunks(call)
    return ledger, n


@pytest.mark.slow
def test_launches_a_chunk_do_not_grow_with_its_rows() -> None:
    request = Request(NAMES)
    counts = []
    for length in (16_384, 32_768):
        ledger, n = on_meta(length, request)
        counts.append(sum(ledger.ops.values()) / n)
    assert counts[1] <= counts[0] * 1.02
    assert counts[1] <= 75


def test_all_launches_of_a_layer_at_32k() -> None:
    """The strongest keys, which no kernel serves at prefill: on a device a launch takes 5 µs of the
    host, so that these are a few milliseconds."""
    ledger, _ = on_meta(32_768, Request(topk=8))
    assert sum(ledger.ops.values()) <= 2600


@pytest.mark.slow
def test_memory_of_a_layer_at_128k_stays_in_the_budget() -> None:
    whole = Request(NAMES, received={"all": Received()}, topk=4)
    heads = 4  # of one kv head
    rows, each = heads * LONG, 4 * 6 + 4 * 12 + 2 * D  # float32 statistics, 4 keys, the output
    ledger, _ = on_meta(LONG, whole, kv_heads=1)
    assert ledger.peak <= 1.3 * (2 << 30) + rows * each


@pytest.mark.parametrize("mask", [Mask(), Mask(window=40), Mask(q_start=30)])
def test_growing_chunks_say_the_same(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of such a device, small enough to matter, against the definition in float64."""
    torch.manual_seed(0)
    lq, lk = 90, 90 + mask.q_start
    q = torch.randn(2, 4, lq, 16, dtype=torch.float64)
    k, v = (torch.randn(2, 2, lk, 16, dtype=torch.float64) for _ in "kv")
    request = Request(NAMES, received={"all": Received()}, topk=3)
    small = chunk_plan.Sizes(900, 3, 40, growing=True)
    monkeypatch.setattr(chunked, "_sizes", lambda call: small)
    ours = attention(q, k, v, mask=mask, request=request, backend="streaming")
    want = attention(q, k, v, mask=mask, request=request, backend="reference")
    torch.testing.assert_close(ours.out, want.out)
    torch.testing.assert_close(ours.lse, want.lse)
    for name, value in want.stats.items():
        torch.testing.assert_close(ours.stats[name], value.to(ours.stats[name]), msg=name)


def test_a_cpu_keeps_chunks_that_fit_its_cache() -> None:
    call = prepare(*(torch.empty(1, 8, 8192, 64) for _ in "qkv"))
    assert chunked._sizes(call) == chunk_plan.Sizes(1 << 22, 64, 128)
    wide = replace(call, q=call.q.to("meta"))
    assert chunked._sizes(wide).budget * 4 == 2 << 30
    assert math.prod(wide.q.shape) == 8 * 8192 * 64
