"""Every route against the float64 definition, on calls of any kind: lengths, caches, windows,
padding, heads, dimensions, types, statistics and edits drawn by hypothesis.

The fast tier draws few; `-m slow` many more. The vendor route runs on emulated calls, whose causal
masks are aligned as either vendor's are."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from test_fused_vendors import Emulated, use
from test_kernels import PLAIN_ROW, assert_same

from interp_kernels import (
    BackendError,
    Mask,
    Received,
    Request,
    Result,
    Rule,
    Steer,
    attention,
    explain,
)
from interp_kernels.fused import vendor_states
from interp_kernels.reference import weights

Tensor = torch.Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Powers of two, what two of them add up to, and neither.
DIMS = (8, 16, 24, 40, 64, 80, 96)


def draw_mask(
    draw: Any, gen: torch.Generator, batch: int, plain: bool = False
) -> tuple[Mask, int, int]:
    """(mask, queries, keys): a prompt, a cache that grows, one with room to spare, one that rolls,
    or another text's keys."""
    cache = draw(st.sampled_from(["none", "none", "dynamic", "static", "rolled", "cross"]))
    lq, past = draw(st.integers(9 if plain else 1, 40)), draw(st.integers(1, 40))
    room = draw(st.integers(1, 40))
    window = draw(st.sampled_from([None, 99] if plain else [None, None, None, 1, 5, 16]))
    q_start = k_start = 0
    lk = lq
    if cache == "dynamic":
        q_start, lk = past, past + lq
    elif cache == "static":
        q_start = past if draw(st.booleans()) else 0
        lk = q_start + lq + room
    elif cache == "rolled":
        window = window or 7
        q_start = past + window
        k_start = past + 1
        lk = q_start + lq - k_start
    elif cache == "cross":
        lk = past
    causal = cache != "cross" and draw(st.integers(0, 5)) > 0
    pads: dict[str, Any] = {}
    side = "" if plain else draw(st.sampled_from(["", "", "", "left", "right", "holes"]))
    if side:
        lengths = torch.randint(0, lk + 1, (batch,), generator=gen)
        column = torch.arange(lk)
        pads["keys"] = {
            "left": column >= lengths[:, None],
            "right": column < lengths[:, None],
            "holes": torch.rand(batch, lk, generator=gen) > 0.3,
        }[side]
        pads["queries"] = torch.rand(batch, lq, generator=gen) > 0.2
    if not plain and window is not None and draw(st.booleans()):
        pads["keep_first"] = draw(st.integers(1, 9))
        if draw(st.booleans()):
            pads["starts"] = torch.randint(-3, lk + 3, (batch,), generator=gen) + k_start
    return Mask(causal=causal, window=window, q_start=q_start, k_start=k_start, **pads), lq, lk


def draw_dense(
    draw: Any, gen: torch.Generator, batch: int, heads: int, lq: int, lk: int, dtype: torch.dtype
) -> Tensor | None:
    """Flags or a bias, of any sample or head, in any layout."""
    kind = draw(st.sampled_from(["", "", "flags", "bias"]))
    if not kind:
        return None
    shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), lk, lq)
    shown = (torch.rand(shape, generator=gen) > 0.3).transpose(2, 3)
    if draw(st.booleans()):
        shown = shown.contiguous()
    if kind == "flags":
        return shown
    kind = draw(st.sampled_from([dtype, torch.float32]))
    bias = torch.randn(shown.shape, generator=gen).to(kind)
    return bias.masked_fill(~shown, draw(st.sampled_from([-math.inf, torch.finfo(kind).min])))


def draw_request(
    draw: Any, gen: torch.Generator, batch: int, lq: int, lk: int, plain: bool = False
) -> Request | None:
    kinds = ["", "pairs", "columns"] if plain else ["", "", "pairs", "rows", "columns", "all"]
    kind = draw(st.sampled_from(kinds))
    if not kind:
        return None
    pairs = {"p": torch.randint(-1, lk, (batch, draw(st.sampled_from([1, lq])), 2), generator=gen)}
    chosen = torch.rand(batch, lq, generator=gen) > 0.5
    questions = {
        "all": Received(),
        "set": Received(chosen, reduce="sum"),
        "band": Received(band=(-2, 9), reduce="max"),
    }
    return Request(
        names=PLAIN_ROW if kind in ("rows", "all") else frozenset(),
        labels=torch.randint(-1, 4, (batch, lk), generator=gen),
        n_groups=4,
        pairs=pairs if kind in ("pairs", "all") else {},
        received=questions if kind in ("columns", "all") else {},
        topk=(topk := draw(st.sampled_from([0, 1, 3])) if kind == "all" else 0),
        topk_rows=torch.randint(0, lq, (3,), generator=gen)
        if topk and draw(st.booleans())
        else None,
    )


def draw_steer(
    draw: Any, gen: torch.Generator, heads: int, lq: int, lk: int, dtype: torch.dtype, plain: bool
) -> Steer | None:
    kinds = ["", "", "", "spans", "gain"]
    if not plain:
        kinds += ["labels", "several", "blend", "labels, bias, temper", "bias", "temper"]
    kind = draw(st.sampled_from(kinds))
    if kind == "gain":
        return Steer(gain=torch.rand(1, heads, 1, generator=gen).to(dtype))
    given: dict[str, Any] = {}
    if "temper" in kind:
        given["temper"] = (torch.rand(1, heads, lq, generator=gen) + 0.5).to(dtype)
    if "bias" in kind:
        bias = torch.randn(1, heads, lk, generator=gen).to(dtype)
        hidden = draw(st.sampled_from([-math.inf, torch.finfo(dtype).min]))
        given["bias"] = bias.masked_fill(torch.rand(bias.shape, generator=gen) > 0.7, hidden)
    if kind == "blend" or (kind == "labels" and draw(st.booleans())):
        given["blend"] = torch.rand(draw(st.sampled_from([1, heads])), generator=gen)
    if not kind:
        return None
    rule = Rule(torch.tensor([[1.0, 0.4]]), torch.tensor([[1.0, 0.0]]))
    if "labels" in kind:
        given["labels"] = (torch.rand(1, heads, lk, generator=gen) > 0.7).long()
        return Steer(rule=rule, **given)
    if kind == "several":
        labels = torch.randint(0, 3, (1, 1, lk), generator=gen)
        second = Rule(torch.tensor([[0.5, 1.5, 0.0]]), renormalise=draw(st.booleans()))
        first = Rule(torch.tensor([[1.0, 0.4, 0.9]]), torch.tensor([[1.0, 0.0, 0.3]]))
        return Steer(labels=labels, rule=(first, second))
    if given:
        return Steer(**given)
    a, b = sorted(torch.randint(0, lk + 1, (2,), generator=gen).tolist())
    return Steer(spans=((0, 1, 1), (a, b, 1)), rule=rule)


def draw_call(draw: Any, halves: bool = False) -> tuple[list[Tensor], dict[str, Any]]:
    """halves: of what a vendor takes."""
    gen = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    batch, kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    d = draw(st.sampled_from(DIMS))
    d_v = d if halves else draw(st.sampled_from([d, d, 24]))
    dtype = draw(st.sampled_from(DTYPES[1:] if halves else DTYPES))
    plain = halves and draw(st.integers(0, 5)) > 0  # and mostly of what it serves
    mask, lq, lk = draw_mask(draw, gen, batch, plain)
    shapes = ((kv * group, lq, d), (kv, lk, d), (kv, lk, d_v))
    tensors = [  # as models lay them out, (batch, tokens, heads, d)
        torch.randn(batch, n, h, size, generator=gen).to(dtype).transpose(1, 2)
        for h, n, size in shapes
    ]
    given: dict[str, Any] = {"mask": mask, "scale": draw(st.sampled_from([d**-0.5, 0.2]))}
    if not plain and draw(st.integers(0, 4)) == 0:
        given["softcap"] = 2.0
    if draw(st.integers(0, 3)) == 0:
        given["sinks"] = torch.randn(kv * group, generator=gen).to(dtype)
    if not plain:
        dense = draw_dense(draw, gen, batch, kv * group, lq, lk, dtype)
        given["mask"] = replace(mask, dense=dense)
    given["request"] = draw_request(draw, gen, batch, lq, lk, plain)
    given["steer"] = draw_steer(draw, gen, kv * group, lq, lk, dtype, plain)
    return tensors, given


def exact(value: Any, like: torch.dtype | None = None) -> Any:
    """In float64; a bias keeps what it hides."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        hidden = value == torch.finfo(value.dtype).min
        return value.double().masked_fill(hidden, -math.inf)
    if isinstance(value, Steer):
        names = ("temper", "bias", "gain", "blend")
        made = {name: exact(getattr(value, name)) for name in names}
        return Steer(**made, labels=value.labels, spans=value.spans, rule=value.rule)
    return value


def compare(got: Result, tensors: list[Tensor], given: dict[str, Any]) -> None:
    wide, kwargs = [exact(x) for x in tensors], {n: exact(x) for n, x in given.items()}
    want = attention(*wide, backend="reference", **kwargs)
    a = weights(*wide[:2], **{n: x for n, x in kwargs.items() if n != "request"})
    fine = tensors[0].dtype == torch.float32
    close = 3e-5 if fine else 2e-2
    assert got.out.dtype == tensors[2].dtype
    torch.testing.assert_close(got.out.double(), want.out, atol=close, rtol=close)
    got.out = want.out
    if not fine and "distance" in want.stats:
        # 16-bit kernels round the position feature with the weights: 2⁻¹² of half a tile
        off = (got.stats["distance"] - want.stats["distance"]).abs().max()
        assert off < 0.05
        got.stats["distance"] = want.stats["distance"]
    assert_same(got, want, a, 3e-5 if fine else 1e-3, given["request"])


def run(data: Any, backend: str) -> None:
    tensors, given = draw_call(data.draw)
    got = attention(*tensors, backend=backend, **given)  # none of these is refused
    compare(got, tensors, given)


TOOK: Counter[str] = Counter()


def run_vendor(data: Any, bottom: bool) -> None:
    tensors, given = draw_call(data.draw, halves=True)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, made := Emulated(bottom))
        vendor_states._passes.cache_clear()
        patch.setattr(vendor_states, "_passes", lambda *a: True)  # `test_fused_vendors` has it
        patch.setattr(vendor_states, "SHORT", 4)
        patch.setattr(vendor_states, "FEW_ROWS", 2)
        try:
            line = explain(*tensors, backend="triton", **given)
        except BackendError:
            return
        compare(attention(*tensors, backend="triton", **given), tensors, given)
        took = "vendor 0" in line
        TOOK["vendor" if took else "own"] += 1
        assert took or not made.called


FAST = 6


@examples(40)
@given(st.data())
def test_streaming(data: Any) -> None:
    run(data, "streaming")


@examples(FAST)
@given(st.data())
def test_kernels(data: Any) -> None:
    run(data, "triton")


@pytest.mark.parametrize("bottom", [False, True], ids=["top left", "bottom right"])
def test_vendors(bottom: bool) -> None:
    TOOK.clear()
    examples(2 * FAST)(given(st.data())(lambda data: run_vendor(data, bottom)))()
    assert TOOK["vendor"] >= 3, TOOK


@pytest.mark.long
@examples(400)
@given(st.data())
def test_streaming_at_length(data: Any) -> None:
    run(data, "streaming")


@pytest.mark.long
@examples(80)
@given(st.data())
def test_kernels_at_length(data: Any) -> None:
    run(data, "triton")


@pytest.mark.long
@pytest.mark.parametrize("bottom", [False, True], ids=["top left", "bottom right"])
def test_vendors_at_length(bottom: bool) -> None:
    TOOK.clear()
    examples(70)(given(st.data())(lambda data: run_vendor(data, bottom)))()
    assert TOOK["vendor"] >= 20, TOOK
