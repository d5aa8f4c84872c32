"""interp_kernels.paged: a query row over pages, against the float64 reference on joined keys."""

from __future__ import annotations

import pytest
import torch
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st

from interp_kernels import Mask, Rule, Steer, attention
from interp_kernels.paged import MILD, reweighed, row_change, row_output, row_weights
from interp_kernels.paged_decode import paged_rows, serves
from interp_kernels.reference import weights


def renormalising(keep: torch.Tensor, spans: tuple[tuple[int, int, int], ...]) -> Steer:
    return Steer(rule=Rule(keep, renormalise=True), spans=spans)


@examples(30)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3), (3, 1)]),
    d=st.sampled_from([4, 7]),
    size=st.sampled_from([1, 4, 16]),
    length=st.integers(1, 40),
    factors=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.7, 3.0]), min_size=2, max_size=2),
    span=st.tuples(st.integers(0, 45), st.integers(0, 20)),
    tempered=st.booleans(),
    turned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_are_the_reference(
    heads: tuple[int, int],
    d: int,
    size: int,
    length: int,
    factors: list[float],
    span: tuple[int, int],
    tempered: bool,
    turned: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    (n, kv), pages = heads, -(-length // size)
    q = torch.randn(n, d, generator=generator)
    keys = torch.randn(pages, kv, size, d, generator=generator)
    values = torch.randn(pages, kv, size, d, generator=generator)
    if turned:  # as a cache may keep them
        keys = keys.transpose(2, 3).contiguous().transpose(2, 3)
    k, v = (
        x.transpose(0, 1).reshape(1, kv, pages * size, d)[:, :, :length] for x in (keys, values)
    )
    keep = torch.ones(n, 2)
    keep[:, 1] = factors[0]
    keep[0, 1] = factors[1]
    spans = ((span[0], span[0] + span[1], 1),)
    steers = [renormalising(keep, spans)]
    if tempered:
        steers.append(Steer(temper=torch.rand(1, n, 1, generator=generator) + 0.5))
    change = row_change(steers, n)
    assert change is not None
    # the reference takes spans inside the keys alone
    cut = tuple((min(a, length), min(b, length), g) for a, b, g in spans)
    exact = [renormalising(keep.double(), cut)]
    exact += [Steer(temper=s.temper.double()) for s in steers[1:] if s.temper is not None]
    mask, row = Mask(q_start=length - 1), q.double()[None, :, None]
    wanted = attention(
        row, k.double(), v.double(), mask=mask, scale=0.4, steer=exact, backend="reference"
    )
    a = row_weights(q[None], keys[None], [length], scale=0.4, change=change)[0]
    full = weights(row, k.double(), mask=mask, scale=0.4, steer=exact)[0, :, 0]
    torch.testing.assert_close(a.double(), full, atol=1e-6, rtol=1e-5)
    z = wanted.out[0, :, 0]
    got = row_output(a[None], values[None])[0]
    torch.testing.assert_close(got.double(), z, atol=1e-5, rtol=1e-5)
    if not change.mild:
        assert tempered or min(factors) < MILD
        return
    plain = row_weights(q[None], keys[None], [length], scale=0.4)
    changed = reweighed(row_output(plain, values[None]), plain, change, lambda i, j: v[:, :, i:j])[
        0
    ]
    torch.testing.assert_close(changed.double(), z, atol=1e-5, rtol=1e-5)


def test_a_row_without_a_key_left_is_zero() -> None:
    keep = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    change = row_change([renormalising(keep, ((0, 9, 1),))], 2)
    a = row_weights(torch.ones(1, 2, 4), torch.zeros(1, 2, 1, 4, 4), [5], scale=1.0, change=change)[
        0
    ]
    assert a[0].tolist() == [0.0] * 5 and a[1].tolist() == pytest.approx([0.2] * 5)


def test_two_rules_on_the_same_keys_multiply() -> None:
    keep, spans = torch.tensor([[1.0, 2.0]]), ((0, 1, 1),)
    change = row_change([renormalising(keep, spans)] * 2, 1)
    assert change is not None and not change.mild
    a = row_weights(
        torch.zeros(1, 1, 4), torch.zeros(1, 1, 1, 4, 4), [4], scale=1.0, change=change
    )[0]
    assert a[0].tolist() == pytest.approx([4 / 7, 1 / 7, 1 / 7, 1 / 7])


@pytest.mark.parametrize(
    "steer",
    [
        Steer(blend=torch.tensor([0.5])),
        Steer(gain=torch.ones(1, 1, 1)),
        Steer(bias=torch.zeros(1, 1, 4)),
        Steer(rule=Rule(torch.ones(1, 2), torch.ones(1, 2)), spans=((0, 1, 1),)),
        Steer(rule=Rule(torch.ones(1, 2), torch.ones(1, 2), renormalise=True), spans=((0, 1, 1),)),
        Steer(rule=Rule(torch.ones(1, 2), renormalise=True), labels=torch.zeros(1, 1, 4).long()),
        Steer(rule=Rule(torch.ones(1, 2), renormalise=True), spans=((0, 2, 1), (1, 3, 0))),
        Steer(
            rule=Rule(torch.ones(1, 2), renormalise=True, rows=torch.ones(1, 1) > 0),
            spans=((0, 1, 1),),
        ),
    ],
)
def test_what_is_no_change_of_logits_is_not_taken_for_one(steer: Steer) -> None:
    assert row_change([steer], 1) is None


def test_pages_that_do_not_hold_the_row_are_an_error() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        row_weights(torch.ones(1, 2, 4), torch.zeros(1, 1, 1, 4, 4), [5], scale=1.0)


@examples(12)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3)]),
    size=st.sampled_from([16, 32]),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    factors=st.tuples(*[st.sampled_from([0.0, 0.1, 0.7, 3.0])] * 2),
    span=st.tuples(st.integers(0, 95), st.integers(0, 40)),
    tempered=st.booleans(),
    turned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_decode_kernel_reads_pages_where_they_lie(
    heads: tuple[int, int],
    size: int,
    lengths: list[int],
    factors: tuple[float, float],
    span: tuple[int, int],
    tempered: bool,
    turned: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """`paged_rows` against `row_weights` and `row_output` in float64; other pages, and what stands
    behind a row's last token, are NaN."""
    generator = torch.Generator().manual_seed(seed)
    (n, kv), count = heads, -(-max(lengths) // size)
    order = torch.randperm(len(lengths) * count + 3, generator=generator)
    blocks = order[: len(lengths) * count].view(len(lengths), count)
    q = torch.randn(len(lengths), n, 32, generator=generator).to(dtype)
    cache = torch.full((len(order), kv, size, 64), torch.nan, dtype=dtype)
    for pages, length in zip(blocks.tolist(), lengths, strict=True):
        for i, block in enumerate(pages):
            there = max(0, min(size, length - i * size))
            cache[block, :, :there] = torch.randn(kv, there, 64, generator=generator).to(dtype)
    keys, values = cache[..., :32], cache[..., 32:]
    if turned:  # a head's keys lie dimension by dimension
        keys = keys.transpose(2, 3).contiguous().transpose(2, 3)
    keep = torch.ones(n, 2)
    keep[:, 1] = factors[0]
    keep[0, 1] = factors[1]
    steers = [renormalising(keep, ((span[0], span[0] + span[1], 1),))]
    if tempered:
        steers.append(Steer(temper=torch.rand(1, n, 1, generator=generator) + 0.5))
    for change in (None, row_change(steers, n)):
        out, weights = paged_rows(q, keys, values, blocks, lengths, scale=0.2, change=change)
        wanted = row_weights(q.double(), keys[blocks].double(), lengths, scale=0.2, change=change)
        there = values[blocks].double().nan_to_num(0.0)
        close = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(weights.double(), wanted, **close)
        torch.testing.assert_close(out.double(), row_output(wanted, there), **close)


@pytest.mark.parametrize(
    "size, dtype", [(8, torch.float32), (24, torch.float32), (16, torch.float64)]
)
def test_pages_that_the_kernel_does_not_read(size: int, dtype: torch.dtype) -> None:
    cache = torch.ones(3, 1, size, 32, dtype=dtype)
    assert not serves(torch.ones(1, 2, 32, dtype=dtype), cache, cache)
    plain = torch.ones(3, 1, 16, 32)
    assert serves(torch.ones(1, 2, 32), plain, plain)


@examples(20)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    size=st.sampled_from([1, 4, 16]),
    factor=st.sampled_from([0.0, 0.4, 3.0]),
    stop=st.integers(1, 25),
    seed=st.integers(0, 99),
)
def test_rows_of_several_requests_are_each_alone(
    lengths: list[int], size: int, factor: float, stop: int, seed: int
) -> None:
    """What stands behind the shorter ones is not seen, whatever it is."""
    generator = torch.Generator().manual_seed(seed)
    rows, pages = len(lengths), -(-max(lengths) // size)
    q = torch.randn(rows, 4, 8, generator=generator)
    keys, values = torch.randn(2, rows, pages, 2, size, 8, generator=generator)
    for row, length in enumerate(lengths):
        flat = keys[row].transpose(0, 1).reshape(2, pages * size, 8).clone()
        flat[:, length:] = torch.nan
        keys[row] = flat.view(2, pages, size, 8).transpose(0, 1)
    change = row_change([renormalising(torch.tensor([[1.0, factor]] * 4), ((0, stop, 1),))], 4)
    together = row_weights(q, keys, lengths, scale=0.5, change=change)
    out = row_output(together, values)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = row_weights(q[one], keys[one], [length], scale=0.5, change=change)
        torch.testing.assert_close(together[one, :, :length], alone)
        assert bool((together[row, :, length:] == 0).all())
        torch.testing.assert_close(out[one], row_output(alone, values[one]))
