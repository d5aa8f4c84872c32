"""interp_vllm.layout: what lies where, learnt from a store that keeps it to itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_engine import KINDS, PagedAttention
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_vllm import ServingError
from interp_vllm.layout import learn


def store_of(attention: PagedAttention) -> Any:
    return lambda k, v, cache, slots: attention.do_kv_cache_update(None, k, v, cache, slots)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    kv_heads=st.integers(1, 4),
    half=st.integers(1, 6),
    page=st.sampled_from([1, 2, 3, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_was_stored_is_read(
    kind: str, kv_heads: int, half: int, page: int, dtype: torch.dtype
) -> None:
    d = 2 * half
    attention = PagedAttention(kind, kv_heads, kv_heads, d, page, 7)
    cache = attention.cache.to(dtype)
    layout = learn(cache, kv_heads, d, d, store_of(attention))
    assert layout.size == page
    assert (layout.key_strides is None) <= (kind == "packed" and page > 1)
    order, length = [5, 0, 3], 2 * page + 1
    key = torch.randn(length, kv_heads, d).to(dtype)
    value = torch.randn(length, kv_heads, d).to(dtype)
    slots = torch.tensor([order[t // page] * page + t % page for t in range(length)])
    attention.do_kv_cache_update(None, key, value, cache, slots)
    blocks = torch.tensor([order])
    keys, values = (
        layout.read_keys(cache, blocks)[0],
        layout.read_values(cache, blocks, [length])[0],
    )
    for got, given_ in ((keys, key), (values, value)):
        flat = got.transpose(0, 1).reshape(kv_heads, 3 * page, d)
        assert torch.equal(flat[:, :length], given_.transpose(0, 1))
    rest = values.transpose(0, 1).reshape(kv_heads, 3 * page, d)[:, length:]
    assert bool((rest == 0).all())  # the cache is NaN there


def test_a_cache_that_rounds_is_refused() -> None:
    attention = PagedAttention("turned", 2, 2, 4, 4, 3)

    def rounding(k: Any, v: Any, cache: Any, slots: Any) -> None:
        attention.do_kv_cache_update(None, (k / 3).round(), v, cache, slots)

    with pytest.raises(ServingError, match="element by element"):
        learn(attention.cache, 2, 4, 4, rounding)


def test_a_cache_that_turns_keys_is_refused() -> None:
    """A sign that goes by the slot: each number is found, and none comes back."""
    attention = PagedAttention("turned", 2, 2, 4, 4, 3)

    def turning(k: Any, v: Any, cache: Any, slots: Any) -> None:
        attention.do_kv_cache_update(None, k.abs(), v, cache, slots)

    with pytest.raises(ServingError, match="does not give back"):
        learn(attention.cache, 2, 4, 4, turning)


def test_pages_that_are_not_of_whole_tokens_are_refused() -> None:
    attention = PagedAttention("turned", 2, 2, 4, 4, 3)
    with pytest.raises(ServingError, match="do not fill"):
        learn(attention.cache, 3, 4, 4, store_of(attention))


def test_tokens_that_skip_pages_are_refused() -> None:
    attention = PagedAttention("turned", 2, 2, 4, 4, 3)

    def swapped(k: Any, v: Any, cache: Any, slots: Any) -> None:
        attention.do_kv_cache_update(None, k, v, cache, (slots + 4) % 8)

    with pytest.raises(ServingError, match="one after the other"):
        learn(attention.cache, 2, 4, 4, swapped)
