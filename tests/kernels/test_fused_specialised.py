"""The warp-specialised forward in the interpreter against float64, and which calls it is
offered."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from loose import forward, reference_attention

from interp_kernels import Mask, Request, Steer, attention
from interp_kernels.fused import configs, specialised
from interp_kernels.fused import forward as forward_module

NAMES = specialised.NAMES
SMALL = configs.Config(32, 32, 1, 1, specialised=True)


@pytest.fixture(scope="module", autouse=True)
def by_it() -> Any:
    """Every forward takes the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "forward", lambda *_: SMALL)
        yield


@examples(25)
@given(
    lq=st.integers(1, 70),
    more=st.integers(-20, 50),
    heads=st.sampled_from([(2, 1), (4, 2), (3, 3)]),
    batch=st.integers(1, 2),
    d=st.sampled_from([16, 64]),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_it_is_the_reference(
    lq: int, more: int, heads: tuple[int, int], batch: int, d: int, causal: bool, dtype: Any,
    seed: int,
) -> None:  # fmt: skip
    """Odd lengths, caches, rows that see nothing, grouped heads, both causal alignments."""
    generator, (n, kv) = torch.Generator().manual_seed(seed), heads
    lk = max(1, lq + more)

    def draw(h: int, length: int) -> torch.Tensor:
        x = torch.randn(batch, length, h, d, generator=generator)
        return x.to(dtype).transpose(1, 2)

    q, k, v = draw(n, lq), draw(kv, lk), draw(kv, lk)
    mask = Mask(causal=causal, q_start=lk - lq if seed % 2 else 0)
    if lk < lq and seed % 2:
        mask = Mask(causal=causal)
    got = forward(q, k, v, mask=mask, names=NAMES, scale=0.3)
    want = reference_attention(
        q.double(), k.double(), v.double(), mask=mask, scale=0.3,
        request=Request(names=frozenset(NAMES)),
    )  # fmt: skip
    near = dict(atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(got.out.double(), want.out, **near)
    torch.testing.assert_close(got.lse.double(), want.lse, atol=1e-4, rtol=1e-4)
    for name in ("entropy", "max"):
        torch.testing.assert_close(got.stats[name].double(), want.stats[name], atol=2e-4, rtol=1e-3)
    best = want.stats["argmax"]
    same = got.stats["argmax"] == best
    assert bool((same | (want.stats["max"] - got.stats["max"]).abs().lt(1e-5)).all())
    assert bool((got.stats["argmax"] < 0).eq(best < 0).all()) and same.double().mean() > 0.98


def tensors(d: int = 64, dtype: Any = torch.bfloat16, d_v: int | None = None) -> list[torch.Tensor]:
    sizes = (d, d, d if d_v is None else d_v)
    return [torch.zeros(1, 40, 2, s, dtype=dtype).transpose(1, 2) for s in sizes]


def test_what_it_is_offered() -> None:
    assert specialised.serves(*tensors(), "", False)
    assert specialised.serves(*tensors(128), "entropy max argmax", False)
    assert not specialised.serves(*tensors(), "", True)  # a window, a bias, padding, …
    assert not specialised.serves(*tensors(), "entropy distance", False)
    assert not specialised.serves(*tensors(96), "", False)
    assert not specialised.serves(*tensors(d_v=32), "", False)
    assert not specialised.serves(*tensors(dtype=torch.float32), "", False)
    q, k, v = tensors()
    assert not specialised.serves(q, k[..., 1:], v, "", False)
    odd = torch.zeros(1, 2, 40, 65, dtype=torch.bfloat16)[..., :64]  # rows of 130 bytes
    assert not specialised.serves(q, odd, v, "", False)


def test_the_table_does_not_take_it_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autotuning tries it, on a Hopper, for calls that it knows."""
    rows = [
        config for table in configs._FORWARD.values() for row in table.values() for config in row
    ]
    assert not any(config.specialised for config in rows)
    q, k, v = tensors()
    settings: dict[str, Any] = dict.fromkeys(f.name for f in fields(forward_module._Arguments))
    settings |= dict(q=q, k=k, v=v, names="", causal=True)

    def tried(**more: Any) -> bool:
        x = forward_module._Arguments(**(settings | more))
        plain = forward_module._plain(x)
        known = specialised.serves(x.q, x.k, x.v, x.names, not plain)
        return any(c.specialised for c in forward_module._candidates(x, known))

    assert tried() and tried(names="entropy")
    assert not tried(window=9) and not tried(keep=torch.ones(1, 1, 40)) and not tried(sinks=q)
    assert not tried(names="group_mass")
    monkeypatch.setattr(configs, "capability", lambda _: (10, 0))
    assert not tried()


def test_what_a_plain_call_won_is_no_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autotuning on a Hopper where the specialised kernel is the fastest: calls of the same shapes
    that hide keys, change logits or have sinks go by another."""
    import triton.testing

    common = configs.Config(32, 32, 1, 1)

    def bench(run: Any, **_: Any) -> float:
        run()
        return 0.5 if run.__defaults__[0].specialised else 1.0

    monkeypatch.setenv("INTERP_AUTOTUNE", "1")
    monkeypatch.setattr(configs, "INTERPRETED", False)
    monkeypatch.setattr(configs, "capability", lambda _: (9, 0))
    monkeypatch.setattr(configs, "forward", lambda *_: common)
    monkeypatch.setattr(configs, "CANDIDATES", (common,))
    monkeypatch.setattr(configs, "SPECIALISED", (SMALL,))
    monkeypatch.setattr(configs, "_FASTEST", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton.testing, "do_bench", bench)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 64, 2, 64, generator=generator).bfloat16().transpose(1, 2) for _ in range(3)
    )
    padded = torch.arange(64)[None] >= 20
    calls: list[dict[str, Any]] = [
        {},
        dict(mask=Mask(keys=padded)),
        dict(steer=Steer(temper=torch.full((1, 2, 1), 3.0))),
        dict(steer=Steer(bias=torch.randn(1, 2, 64, generator=generator))),
        dict(sinks=torch.full((2,), 3.0)),
    ]
    for settings in calls:
        settings |= dict(scale=0.3, request=Request(names=frozenset({"entropy"})))
        got = attention(q, k, v, backend="triton", **settings)
        want = reference_attention(q.double(), k.double(), v.double(), **settings)
        torch.testing.assert_close(got.out.double(), want.out, atol=3e-2, rtol=3e-2)
    assert [c.specialised for c in configs._FASTEST.values()].count(True) == 1


def test_the_allocator_stays_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.runtime._allocation as allocation

    def mine(size: int, alignment: int, stream: int | None) -> Any:
        raise AssertionError

    before = allocation._allocator.get()
    allocation._allocator.set(mine)
    try:
        q, k, v = tensors()
        forward(q, k, v)
        assert allocation._allocator.get() is mine
    finally:
        allocation._allocator.set(before)
