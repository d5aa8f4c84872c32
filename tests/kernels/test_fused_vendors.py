"""The vendor route on a CPU: fused calls of other libraries emulated by a float64 eager, with the
causal alignment of either, and wrong in the ways that they have been."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from interp_kernels import Mask, Received, Request, Rule, Steer, attention, explain
from interp_kernels.fused import vendor_flex, vendor_states
from interp_kernels.fused.vendor_states import Vendor, cudnn_guard

Tensor = torch.Tensor

CPU = torch.device("cpu")
ACT = Rule(torch.tensor([[1.0, 0.4]]), torch.tensor([[1.0, 0.0]]))


class Emulated:
    """A fused call as a vendor makes it. `bottom`: a causal mask that is no square ends at the
    bottom right corner, as FlashAttention 2.1's does, else it begins at the top left, as cuDNN's
    does. `fault` (s, causal) spoils the logits."""

    def __init__(self, bottom: bool, fault: Any = None) -> None:
        self.bottom, self.fault = bottom, fault
        self.asked: list[tuple[int, int, bool]] = []
        self.called: list[tuple[int, int, bool]] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        lq, lk, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        self.called.append((lq, lk, causal))
        keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
        s = scale * q.double() @ keys.transpose(-1, -2)
        if causal:
            shift = lk - lq if self.bottom else 0
            s = s.masked_fill(torch.ones(lq, lk, dtype=torch.bool).triu(shift + 1), -torch.inf)
        if self.fault is not None:
            s = self.fault(s, causal)
        lse = s.logsumexp(-1)
        out = (s - lse.nan_to_num(neginf=0.0)[..., None]).exp() @ values
        # cuDNN's log-sum-exp has a last dimension of 1
        return out.to(v.dtype), lse.float() if self.bottom else lse.float()[..., None]

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
        self.asked.append((q.shape[2], k.shape[2], causal))
        # torch's own check of FlashAttention
        return "not a square" if self.bottom and causal and q.shape[2] != k.shape[2] else ""


def use(monkeypatch: pytest.MonkeyPatch, *made: Emulated) -> None:
    vendors = tuple(Vendor(f"vendor {i}", one, one.refuses) for i, one in enumerate(made))
    monkeypatch.setattr(vendor_states, "VENDORS", vendors)


@pytest.fixture(params=[False, True], ids=["top left", "bottom right"])
def vendor(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    made = Emulated(request.param)
    use(monkeypatch, made)
    # the interpreter is slow: short calls are the vendor's too
    monkeypatch.setattr(vendor_states, "SHORT", 12)
    monkeypatch.setattr(vendor_states, "FEW_ROWS", 4)
    yield made


def tensors(lq: int, lk: int, d: int = 8, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(lq + lk)
    return [torch.randn(1, h, n, d).to(dtype) for h, n in ((2, lq), (1, lk), (1, lk))]


def same(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> None:
    got = attention(q, k, v, backend="triton", **settings)
    want = attention(q.double(), k.double(), v.double(), backend="reference", **settings)
    torch.testing.assert_close(got.out.double(), want.out, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(got.lse.double(), want.lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("lq", "lk", "settings"),
    [
        (41, 41, {}),
        (37, 90, {}),  # a static cache: room after the last query
        (37, 90, {"mask": Mask(q_start=40)}),  # the same, later on
        (37, 77, {"mask": Mask(q_start=40)}),  # a dynamic one
        (37, 90, {"mask": Mask(causal=False)}),
        (37, 90, {"steer": Steer(spans=((0, 1, 1),), rule=ACT)}),
        (70, 120, {"steer": Steer(spans=((0, 1, 1), (20, 45, 1)), rule=ACT)}),
        (
            37,
            90,
            {"mask": Mask(q_start=40), "steer": Steer(spans=((3, 50, 1),), rule=ACT)},
        ),
        (37, 90, {"mask": Mask(causal=False), "steer": Steer(spans=((0, 9, 1),), rule=ACT)}),
        (37, 90, {"mask": Mask(window=37), "steer": Steer(gain=torch.full((1, 2, 1), 0.5))}),
    ],
)
def test_either_alignment_gives_the_definition(
    vendor: Emulated, lq: int, lk: int, settings: dict[str, Any]
) -> None:
    q, k, v = tensors(lq, lk)
    line = explain(q, k, v, backend="triton", **settings)
    assert "vendor 0" in line, line
    vendor.called.clear()
    same(q, k, v, **settings)
    assert vendor.called
    for rows, keys, causal in vendor.called:
        assert rows == keys or not causal


def test_torch_is_asked_about_the_very_call(vendor: Emulated) -> None:
    q, k, v = tensors(37, 90)
    vendor_states._passes.cache_clear()
    attention(q, k, v, backend="triton")
    assert vendor.asked == [(37, 37, True)]
    assert vendor.called[-1:] == [(37, 37, True)]
    vendor.asked.clear()
    attention(q, k, v, mask=Mask(q_start=40), backend="triton")
    assert vendor.asked == [(37, 37, True), (37, 77, False)]
    params = vendor_states._params(q, k[:, :, :37], v[:, :, :37], True)
    assert params.is_causal
    assert params.key.shape[2] == 37


def test_a_causal_call_off_the_square_is_never_made(vendor: Emulated) -> None:
    q, k, v = tensors(37, 90)
    with pytest.raises(ValueError, match="37 queries and 90 keys"):
        vendor_states.flash("vendor 0", 0.3)(q, k, v, True, None)
    with pytest.raises(ValueError, match="no padding"):
        vendor_states.flash("vendor 0", 0.3)(q, k, v, False, torch.ones(1, 90, dtype=torch.bool))


def off_by_one(s: Tensor, causal: bool) -> Tensor:
    hidden = (
        torch.ones(s.shape[-2:], dtype=torch.bool).triu(0).index_fill(0, torch.tensor(0), False)
    )
    return s.masked_fill(hidden, -torch.inf) if causal else s


def reads_past_the_end(s: Tensor, causal: bool) -> Tensor:
    """The rest of the last tile counts as keys of logit 0, as cuDNN up to 9.15.0 had it."""
    rest = -s.shape[-1] % 128
    return (
        torch.cat([s, s.new_zeros(*s.shape[:-1], rest)], -1).softmax(-1)[..., : s.shape[-1]].log()
    )


def square_only(s: Tensor, causal: bool) -> Tensor:
    return s if s.shape[-1] == s.shape[-2] else s[..., :1].expand_as(s)


def causal_at_the_wrong_corner(s: Tensor, causal: bool) -> Tensor:
    """Counted from the end of a padded tile."""
    rows, keys = s.shape[-2:]
    hidden = torch.ones(rows, keys, dtype=torch.bool).triu(-rows % 128 + 1)
    return s.where(s > -torch.inf, 0.0).masked_fill(hidden, -torch.inf) if causal else s


def base_two(s: Tensor, causal: bool) -> Tensor:
    return s * 1.4426950408889634


@pytest.mark.parametrize(
    "fault", [off_by_one, reads_past_the_end, square_only, causal_at_the_wrong_corner, base_two]
)
def test_a_faulty_call_is_found_out(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not used; the next vendor that is right is, or our own kernel."""
    bad, good = Emulated(False, fault), Emulated(True)
    use(monkeypatch, bad, good)
    q, k, v = tensors(45, 140)
    assert "vendor 1" in explain(q, k, v, backend="triton")
    use(monkeypatch, bad)
    line = explain(q, k, v, backend="triton")
    assert line.startswith("triton: fused forward"), line
    assert "does not give what is expected" in line
    bad.called.clear()
    same(q, k, v)
    assert not bad.called


def test_few_rows_and_short_spans_are_our_own_kernel(vendor: Emulated) -> None:
    q, k, v = tensors(41, 41)
    steer = Steer(spans=((2, 38, 1),), rule=ACT)  # leaves 2 columns before and 3 rows after
    attention(q, k, v, steer=steer, backend="triton")
    vendor.called.clear()
    same(q, k, v, steer=steer)
    assert (36, 36, True) in vendor.called
    assert all(
        rows >= vendor_states.FEW_ROWS and keys >= vendor_states.SHORT
        for rows, keys, _ in vendor.called
    )


@pytest.mark.parametrize(
    ("capability", "version", "cuda", "heads", "word"),
    [
        ((9, 0), 91501, "12.9", (32, 8), ""),
        ((9, 0), 91500, "12.9", (32, 8), "off multiples of 128"),
        ((9, 0), 90100, "13.0", (32, 8), "off multiples of 128"),
        ((8, 0), 92000, "13.0", (32, 8), "8.0"),
        ((8, 9), 92000, "13.0", (32, 8), "8.9"),
        ((12, 0), 92000, "13.0", (32, 8), "12.0"),
        ((10, 0), 92000, "13.0", (32, 8), ""),
        ((10, 3), 92000, "12.9", (32, 8), ""),
        ((10, 1), 92000, "12.9", (32, 8), "wants CUDA 13"),
        ((10, 1), 92000, "13.0", (32, 8), ""),
        ((10, 0), 92000, "13.0", (32, 4), "fewer than 8 kv heads"),
        ((10, 0), 92000, "13.0", (4, 4), ""),
    ],
)
def test_the_guard_on_cudnn(
    capability: tuple[int, int],
    version: int,
    cuda: str,
    heads: tuple[int, int],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torch's `check_prefer_cudnn_attention`; and few kv heads on capability 10."""
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    why = cudnn_guard(capability, version, cuda, heads)
    assert (word in why) if word else not why
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert cudnn_guard(capability, version, cuda, heads)


@pytest.mark.parametrize("lq, lk, causal", [(203, 203, True), (77, 333, False), (300, 150, False)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_flex_attention_is_called_as_a_vendor(
    lq: int, lk: int, causal: bool, kv_heads: int
) -> None:
    """What the call to FlashAttention 4 says, said to FlexAttention's own definition on a CPU."""
    generator = torch.Generator().manual_seed(lq)
    shapes = ((4, lq), (kv_heads, lk), (kv_heads, lk))
    q, k, v = (torch.randn(1, h, n, 16, generator=generator) for h, n in shapes)
    out, lse = vendor_flex.call(q, k, v, causal, 0.3)
    keys, values = (x.double().repeat_interleave(4 // kv_heads, 1) for x in (k, v))
    s = 0.3 * q.double() @ keys.transpose(-1, -2)
    if causal:
        s = s.masked_fill(torch.ones(lq, lk, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.double(), s.softmax(-1) @ values, atol=1e-5, rtol=1e-4)


def test_flash_attention_4_is_for_long_texts_on_its_own_gpus() -> None:
    assert vendor_flex.of_machine((9, 0), vendor_flex.LONG, True) == ""
    assert vendor_flex.of_machine((10, 3), 131_072, True) == ""
    assert "8.0" in vendor_flex.of_machine((8, 0), 131_072, True)
    assert "12.0" in vendor_flex.of_machine((12, 0), 131_072, True)
    assert "flash-attn-4" in vendor_flex.of_machine((9, 0), 131_072, False)
    assert "compilation" in vendor_flex.of_machine((9, 0), 4096, True)
    x = torch.zeros(1, 2, 8, 16)
    assert "cpu" in vendor_flex.refuses(x, x, x, True)


@pytest.mark.parametrize(
    "lq, lk", [(1, 1), (127, 128), (128, 128), (203, 203), (700, 300), (300, 700), (641, 642)]
)
def test_the_mask_of_flex_attention_is_made_by_blocks(lq: int, lk: int) -> None:
    """PyTorch's own, which looks at every query and key."""
    from torch.nn.attention.flex_attention import create_block_mask

    own = create_block_mask(lambda b, h, i, j: i >= j, None, None, lq, lk, device="cpu")
    found = vendor_flex._causal(lq, lk, CPU)
    assert (own.shape, own.BLOCK_SIZE) == (found.shape, found.BLOCK_SIZE)
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(own, f"{kind}_num_blocks")
        assert torch.equal(getattr(found, f"{kind}_num_blocks"), counts)
        for row, n in enumerate(counts.flatten().tolist()):
            each = (getattr(one, f"{kind}_indices")[0, 0, row, :n] for one in (own, found))
            first, second = (sorted(one.tolist()) for one in each)
            assert first == second


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            self.elements = max(self.elements, one.numel() if isinstance(one, Tensor) else 0)
        return out


def test_the_mask_of_a_long_text_is_small() -> None:
    """A few numbers a block, where queries · keys are 268 million."""
    with Largest() as largest:
        vendor_flex._causal.__wrapped__(16_384, 16_384, CPU)
    assert largest.elements <= 4 * 128 * 128


def test_what_a_compiler_raises_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's limit of graphs is no RuntimeError."""

    class Limit(Exception):
        pass

    def raises(*_: Any, **__: Any) -> Any:
        raise Limit("too many graphs")

    monkeypatch.setattr(vendor_flex, "_attention", lambda _: raises)
    q, k, v = tensors(16, 16)
    with pytest.raises(RuntimeError, match="too many graphs"):
        vendor_flex.call(q, k, v, True, 0.3)


def test_a_vendor_that_gives_up_later_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is refused after all is our own kernel's; memory that is out is told."""
    made = Emulated(False)
    use(monkeypatch, made)
    monkeypatch.setattr(vendor_states, "SHORT", 12)
    monkeypatch.setattr(vendor_states, "FEW_ROWS", 4)
    vendor_states._warn.cache_clear()
    q, k, v = tensors(41, 41)
    same(q, k, v)
    assert made.called[-1] == (41, 41, True)

    def fails(error: Exception) -> Any:
        def fault(s: Tensor, causal: bool) -> Tensor:
            raise error

        return fault

    made.fault = fails(RuntimeError("no plan found"))
    with pytest.warns(UserWarning, match="no plan found"):
        same(q, k, v)
    made.fault = fails(torch.OutOfMemoryError("out"))
    with pytest.raises(torch.OutOfMemoryError):
        attention(q, k, v, backend="triton")


@pytest.mark.parametrize("steer", [None, Steer(spans=((3, 9, 1),), rule=ACT)])
def test_no_output_wanted_is_no_other_route(vendor: Emulated, steer: Steer | None) -> None:
    q, k, v = tensors(64, 64, 32)
    said = {
        explain(
            q, k, v, steer=steer, backend="triton",
            request=Request(received={"x": Received()}, out=out),
        )
        for out in (True, False)
    }  # fmt: skip
    assert len(said) == 1 and "vendor 0" in said.pop()
    whole, bare = (
        attention(
            q, k, v, steer=steer, backend="triton",
            request=Request(received={"x": Received()}, out=out),
        ).stats["received:x"]
        for out in (True, False)
    )  # fmt: skip
    torch.testing.assert_close(whole, bare, atol=1e-4, rtol=1e-3)
