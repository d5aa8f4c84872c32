"""The triton backend against the float64 reference: forward, rules, merging, routes, errors. On a
GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from loose import forward, loose, merge
from test_kernels import PLAIN_ROW, assert_same, make_case

from interp_kernels import (
    BackendError,
    Mask,
    Received,
    Request,
    Rule,
    Steer,
    attention,
    dispatch,
    explain,
)
from interp_kernels.fused import backend, configs
from interp_kernels.fused.configs import Config
from interp_kernels.fused.forward import Keys
from interp_kernels.fused.merge import Piece
from interp_kernels.fused.primitives import padded_dim, parts
from interp_kernels.reference import weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """The interpreter makes thousands of tiny operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def there(value: Any) -> Any:
    """Every tensor inside moved to the device."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {k: there(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(there(v) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: there(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


def wide(value: Any) -> Any:
    """Floating-point tensors in float64, on the CPU, where the definition is computed."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().double() if value.is_floating_point() else value.cpu()
    if isinstance(value, dict):
        return {k: wide(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(wide(v) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: wide(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


def back(result: Any) -> Any:
    result.out, result.lse = result.out.cpu(), result.lse.cpu()
    result.stats = {k: v.cpu() for k, v in result.stats.items()}
    return result


def compare(tensors: tuple[torch.Tensor, ...], kwargs: dict[str, Any], tolerance: float) -> None:
    got = back(attention(*there(tensors), backend="triton", **there(kwargs)))
    assert got.lse.dtype == torch.float32
    assert got.out.dtype == tensors[2].dtype
    want = attention(*wide(tensors), backend="reference", **wide(kwargs))
    a = weights(
        *wide(tensors)[:2],
        **{k: v for k, v in wide(kwargs).items() if k not in ("request", "steer")},
    )
    assert_same(got, want, a, tolerance, kwargs.get("request"))


def fused_case(
    draw: Any, dtype: torch.dtype, largest: int = 40
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """As `make_case`."""
    return make_case(draw, dtype, largest)


@pytest.mark.slow
@examples(25)
@given(st.data())
def test_equals_reference(data: Any) -> None:
    tensors, kwargs = fused_case(data.draw, torch.float32)
    compare(tensors, kwargs, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [16, 64, 80, 96, 128, 256])
def test_half_inputs_and_head_dims(dtype: torch.dtype, d: int) -> None:
    """Output within the rounding of 16-bit weights; statistics, summed in float32, closer."""
    torch.manual_seed(d)
    q, k, v = (torch.randn(1, 77, h, d).to(dtype).transpose(1, 2) for h in (4, 2, 2))
    request = Request(
        PLAIN_ROW, torch.randint(-1, 5, (1, 77)), 5, {"p": torch.randint(-1, 77, (1, 77, 2))},
        {"all": Received(), "late": Received(torch.arange(77)[None] > 60)},
    )  # fmt: skip
    got = back(attention(*there((q, k, v)), request=there(request), backend="triton"))
    want = attention(*wide((q, k, v)), request=request, backend="reference")
    torch.testing.assert_close(got.out.double(), want.out, atol=1e-2, rtol=1e-2)
    got.out = want.out
    got.stats["distance"] = (
        got.stats["distance"]
        .double()
        .where(
            (got.stats["distance"] - want.stats["distance"]).abs() > 0.05, want.stats["distance"]
        )
    )  # the position feature is rounded with the weights: 2⁻¹² of half a tile
    assert_same(got, want, weights(*wide((q, k))[:2], mask=Mask(), scale=d**-0.5), 5e-4)


@pytest.mark.parametrize("d", [72, 80, 96, 160, 192])
def test_head_dims_of_two_tiles(d: int) -> None:
    """A tile as wide as the largest power of two below, and one for the rest: forward, columns,
    decode, lists."""
    assert sum(parts(d)) < padded_dim(d)
    torch.manual_seed(d)
    q, k = torch.randn(1, 2, 37, d), torch.randn(1, 1, 37, d)
    v = torch.randn(1, 1, 37, 2 * d if d < 96 else 24)
    request = Request(frozenset({"entropy"}), received={"all": Received()})
    compare((q, k, v), dict(mask=Mask(), scale=d**-0.5, request=request), 2e-5)
    steer = Steer(labels=(torch.arange(37)[None, None] % 3 == 0).long(), rule=Rule(torch.eye(2)))
    compare((q, k, v), dict(mask=Mask(), scale=d**-0.5, steer=steer), 2e-5)
    compare((q[:, :, :2], k, v), dict(mask=Mask(q_start=35), scale=d**-0.5), 2e-5)


def make_steer(draw: Any, shape: tuple[int, int, int, int]) -> Steer:
    """Any edit but σ on (batch, heads, queries, keys)."""
    batch, heads, lq, lk = shape
    gen = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def random(*sizes: int) -> torch.Tensor:
        shared = [draw(st.sampled_from([1, n])) if i < 2 else n for i, n in enumerate(sizes)]
        return torch.rand(shared, generator=gen)

    made: dict[str, Any] = {}
    if draw(st.booleans()):
        made["temper"] = random(batch, heads, lq) + 0.5
    if draw(st.booleans()):
        bias = random(batch, heads, lk) - 0.5
        made["bias"] = bias.masked_fill(torch.rand(bias.shape, generator=gen) > 0.8, -math.inf)
    kind = draw(st.sampled_from(["", "act", "move", "renormalise", "at least", "drop", "gated"]))
    if kind:
        groups = draw(st.integers(1, 8)) if kind != "act" else 2
        keep = torch.rand(draw(st.sampled_from([1, heads])), groups, generator=gen)
        receive = (
            None
            if kind in ("renormalise", "drop")
            else torch.rand(1, groups, generator=gen).round()
        )
        if kind == "act":
            keep, receive = torch.tensor([[1.0, 0.4]]), torch.tensor([[1.0, 0.0]])
        tests = bounds = rows = None
        if kind == "gated":
            tests, bounds = torch.randn(2, groups, generator=gen), torch.tensor([-0.3, 0.0])
            rows = torch.rand(batch, lq, generator=gen) > 0.3
        shares = kind in ("renormalise", "at least")
        made["rule"] = Rule(keep, receive, shares, tests, bounds, rows)
        if draw(st.booleans()) and lk > 2:
            edges = sorted(torch.randint(0, lk + 1, (2,), generator=gen).tolist())
            made["spans"] = ((0, 1, groups - 1), (*edges, groups // 2))
        else:
            labels = torch.randint(
                0, groups, (1, draw(st.sampled_from([1, heads])), lk), generator=gen
            )
            made["labels"] = labels * (torch.rand(labels.shape, generator=gen) > 0.5)
    if draw(st.booleans()):
        made["blend"] = torch.rand(draw(st.sampled_from([1, heads])), generator=gen)
    if draw(st.booleans()):
        made["gain"] = random(batch, heads, draw(st.sampled_from([1, lq])))
    return Steer(**made)


@pytest.mark.slow
@examples(40)
@given(st.data())
def test_edits_equal_the_definition(data: Any) -> None:
    tensors, kwargs = fused_case(data.draw, torch.float32)
    q, k, _ = tensors
    steer = make_steer(data.draw, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    if steer.rule is not None or steer.blend is not None:
        kwargs.pop("request", None)
    compare(tensors, {**kwargs, "steer": steer}, 2e-5)


def test_sigmoid_weights() -> None:
    q, k, v = torch.randn(2, 4, 50, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 16)
    mask = Mask(keys=torch.arange(50)[None] >= torch.tensor([[0], [7]]))
    compare(
        (q, k, v),
        dict(mask=mask, scale=0.3, steer=Steer(sigmoid=-math.log(50), gain=torch.rand(1, 4, 1))),
        1e-5,
    )


def test_statistics_of_a_decode_step_after_a_rule() -> None:
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 16)
    steer = Steer(
        labels=(torch.arange(70)[None, None] % 3 == 0).long(),
        rule=Rule(torch.tensor([[1.0, 0.4]]), torch.tensor([[1.0, 0.0]])),
    )
    request = Request(
        PLAIN_ROW, torch.zeros(1, 70, dtype=torch.long), 1, topk=3, received={"all": Received()}
    )
    compare((q, k, v), dict(mask=Mask(q_start=69), scale=0.25, steer=steer, request=request), 1e-5)


def test_a_sink_with_nearly_all_the_mass() -> None:
    """The rest holds less than a millionth of a row: as a difference from the whole, no digit of it
    would be left."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 120, 32) for _ in range(3))
    direction = torch.nn.functional.normalize(torch.ones(32), dim=0)
    q, k[:, :, 0] = q + 9 * direction, 9 * direction
    steer = Steer(
        spans=((0, 1, 1),), rule=Rule(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    )
    mass = weights(q, k, mask=Mask(), scale=0.5)[..., 1:, 1:].sum(-1)
    assert mass.median() < 1e-6
    compare((q, k, v), dict(mask=Mask(), scale=0.5, steer=steer), 1e-5)


def test_receivers_that_hold_nothing() -> None:
    """In float32 their mass underflows: the row stays as it is, nothing overflows."""
    q, k, v = (torch.ones(1, 1, 20, 16) for _ in range(3))
    k[:, :, 0] = 50.0
    steer = Steer(
        spans=((0, 1, 1),), rule=Rule(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    )
    for name in ("triton", "streaming"):
        out = attention(*there((q, k, v)), scale=1.0, steer=there(steer), backend=name).out
        torch.testing.assert_close(out.cpu(), v)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [Config(16, 16, 1, 1), Config(64, 16, 1, 1), Config(16, 64, 1, 1)]
)
@pytest.mark.skipif(DEVICE == "cuda", reason="the tiles of the static table are tested there")
def test_tiles_of_any_shape(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "forward", lambda *_: config)
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 2, 50, 16), torch.randn(1, 1, 83, 16), torch.randn(1, 1, 83, 16)
    request = Request(PLAIN_ROW, torch.randint(-1, 16, (1, 83)), 16, cap=20)
    for mask in (
        Mask(q_start=33),
        Mask(q_start=33, window=25),
        Mask(causal=False, window=9),
        Mask(causal=False),
    ):
        compare((q, k, v), dict(mask=mask, scale=0.3, request=request), 2e-5)


def test_keys_of_a_group() -> None:
    labels = torch.tensor([[[0, 1, 0, 2, 1, 0, 1]]])
    keys = Keys.padding(torch.tensor([[True] * 7, [False, False] + [True] * 5]))
    assert keys.ends is not None
    assert keys.ends.tolist() == [[0, 7], [2, 7]]
    ones = keys.group(labels, 1, 2, 3)
    assert ones.lists is not None and ones.counts is not None
    assert ones.counts.tolist() == [[3] * 3, [2] * 3]
    assert ones.lists[0, 0, :3].tolist() == [1, 4, 6]
    assert ones.lists[1, 2, :2].tolist() == [4, 6]
    zeros = keys.group(labels, 0, 2, 3)
    assert zeros.keep is not None
    assert zeros.keep[1, 0].tolist() == [False, False, True, False, False, True, False]


@pytest.mark.slow
def test_keys_and_values_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of (batch, tokens, heads · d) as models make them, and a cache with room, go in as they
    are."""
    cache = torch.randn(2, 1, 2, 300, 32)
    k, v = cache[0, :, :, 7:193], cache[1, :, :, 7:193]
    q = torch.randn(1, 186, 4, 32).transpose(1, 2)
    clone, contiguous = torch.Tensor.clone, torch.Tensor.contiguous

    def guard(original: Any) -> Any:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            made = original(self, *args, **kwargs)
            assert made is self or self.numel() < k.numel(), "a copy of keys or values"
            return made

        return call

    monkeypatch.setattr(torch.Tensor, "clone", guard(clone))
    monkeypatch.setattr(torch.Tensor, "contiguous", guard(contiguous))
    request = Request(frozenset({"entropy"}), received={"all": Received()})
    steer = Steer(
        labels=(torch.arange(186)[None, None] % 9 == 0).long(),
        rule=Rule(torch.tensor([[1.0, 2.0]]), renormalise=True),
    )
    for kwargs in (dict(request=request), dict(steer=steer)):
        attention(*there((q, k, v)), backend="triton", **there(kwargs))
    attention(
        *there((q[:, :, -1:], k, v)), mask=Mask(q_start=185), backend="triton", steer=there(steer)
    )


def rule_with_gradients() -> tuple[Steer, list[torch.Tensor]]:
    leaves = [
        torch.tensor([[1.0, 0.4, 0.9]] * 4, device=DEVICE, requires_grad=True),
        torch.tensor([[1.0, 0.0, 0.5]], device=DEVICE, requires_grad=True),
        torch.rand(4, device=DEVICE).requires_grad_(),
        torch.rand(2, 4, 45, device=DEVICE).requires_grad_(),
    ]
    labels = torch.arange(45, device=DEVICE)[None, None] % 3
    return Steer(
        labels=labels, rule=Rule(leaves[0], leaves[1]), blend=leaves[2], gain=leaves[3]
    ), leaves


@pytest.mark.slow
@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_of_parameters(sinks: bool) -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, h, 45, 16, device=DEVICE) for h in (4, 2, 2))
    logit = torch.randn(4, device=DEVICE) if sinks else None
    target = torch.randn(2, 4, 45, 16, device=DEVICE)
    grads = []
    for name in ("triton", "reference"):
        torch.manual_seed(4)
        steer, leaves = rule_with_gradients()
        out = attention(q, k, v, sinks=logit, steer=steer, backend=name).out
        grads.append(torch.autograd.grad((out * target).sum(), leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_merge_has_a_backward_of_its_own() -> None:
    """Against torch's derivative of the same sum, in the states themselves; pieces cover different
    rows."""
    torch.manual_seed(5)
    spans = [(0, 0, 37), (1, 5, 32), (2, 9, 10), (1, 20, 17)]  # group, first row, rows
    leaves = [
        (
            torch.randn(2, n, 4, 24, device=DEVICE).transpose(1, 2).requires_grad_(),
            torch.randn(2, 4, n, device=DEVICE),
        )
        for _, _, n in spans
    ]
    for _, lse in leaves:
        lse.requires_grad_()
    rule = Rule(
        torch.rand(4, 3, device=DEVICE).requires_grad_(),
        torch.tensor([[1.0, 0.0, 0.5]], device=DEVICE),
    )
    pieces = [
        Piece(g, start, out, lse) for (g, start, _), (out, lse) in zip(spans, leaves, strict=True)
    ]
    v = torch.zeros(2, 2, 37, 24, device=DEVICE)
    got = merge(pieces, rule, queries=37, v=v)
    pad = torch.nn.functional.pad
    shares = torch.stack(
        [pad(p.lse, (p.start, 37 - p.start - p.lse.shape[2]), value=-math.inf) for p in pieces], -1
    ).softmax(-1)
    mass = torch.stack(
        [shares[..., [i for i, p in enumerate(pieces) if p.group == g]].sum(-1) for g in range(3)],
        -1,
    )
    assert rule.receive is not None
    keep, receive = rule.keep[None, :, None], rule.receive[None, :, None]
    freed, shared = (
        ((1 - keep) * mass).sum(-1, keepdim=True),
        (receive * mass).sum(-1, keepdim=True),
    )
    factor = keep + receive * freed / shared
    want = sum(
        (shares[..., i] * factor[..., p.group])[..., None]
        * pad(p.out, (0, 0, p.start, 37 - p.start - p.out.shape[2]))
        for i, p in enumerate(pieces)
    )
    torch.testing.assert_close(got.out, want, atol=1e-5, rtol=1e-5)
    target = torch.randn_like(got.out)
    inputs = [x for pair in leaves for x in pair] + [rule.keep]
    for x, y in zip(
        *(torch.autograd.grad((o * target).sum(), inputs) for o in (got.out, want)), strict=True
    ):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_many_pieces_are_merged_in_turns() -> None:
    torch.manual_seed(6)
    outs, lses = (
        torch.randn(20, 1, 2, 9, 16, device=DEVICE),
        torch.randn(20, 1, 2, 9, device=DEVICE),
    )
    pieces = [
        Piece(i % 3, 0, out, lse) for i, (out, lse) in enumerate(zip(outs, lses, strict=True))
    ]
    got = merge(
        pieces, Rule(torch.tensor([[1.0, 0.5, 2.0]], device=DEVICE)), queries=9, v=pieces[0].out
    )
    shares = torch.stack([p.lse for p in pieces], -1).softmax(-1)
    want = sum(
        shares[..., i, None] * p.out * (1.0, 0.5, 2.0)[p.group] for i, p in enumerate(pieces)
    )
    torch.testing.assert_close(got.out, want, atol=1e-5, rtol=1e-5)


def test_operators_have_shapes_without_values() -> None:
    """Fake kernels: torch.compile and CUDA graphs can plan around the launches."""
    q, k, v = (torch.randn(1, h, 20, 16, device=DEVICE) for h in (4, 2, 2))
    common = (None,) * 11
    args = (q, k, v, *common, 0.25, True, 0, None, 0, None, None, "entropy argmax", 0, 10)
    torch.library.opcheck(
        torch.ops.interp.forward.default, args, test_utils=("test_schema", "test_faketensor")
    )
    lse = torch.randn(1, 4, 20, device=DEVICE)
    rest = (v, None, None, None, None, None, None, None, None, None, False, 0, 20)
    torch.library.opcheck(
        torch.ops.interp.merge.default, ([q, q], [lse, lse], [0, 0], [0, 1], *rest),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_compiles_around_the_kernels() -> None:
    q, k, v = (torch.randn(1, h, 40, 16, device=DEVICE) for h in (4, 2, 2))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        state = forward(q * 2, k, v, scale=0.25, names=["entropy"])
        return state.out.sum(-1) + state.stats["entropy"]

    torch.testing.assert_close(
        torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v), call(q, k, v)
    )


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(), "fused forward|cuDNN|FlashAttention"),
        (dict(request=Request(frozenset({"entropy"}))), "entropy come in the same pass"),
        (dict(request=Request(received={"all": Received()})), "key-major pass"),
        (dict(request=Request(topk=2)), "row-major pass of q and k: top-k by block maxima"),
        (dict(request=Request(topk=65)), "chunked top-k, of more than 64 keys a row"),
        (
            dict(
                request=Request(frozenset({"max"})),
                steer=Steer(spans=((0, 1, 1),), rule=Rule(torch.tensor([[1.0, 0.4]]))),
            ),
            "row-major pass of q and k: max",
        ),
        (dict(mask=Mask(dense=torch.ones(1, 1, 40, 40, dtype=torch.bool))), "of the dense mask"),
        (dict(mask=Mask(window=5, keep_first=2)), "the keys kept beyond it"),
        (dict(request=Request(topk=2, topk_rows=torch.tensor([3, 30]))), "decode steps"),
        (dict(steer=Steer(gain=torch.ones(1, 4, 1))), "fused merge"),
        (dict(mask=Mask(keys=torch.ones(1, 40, dtype=torch.bool))), "padding"),
        (dict(softcap=3.0), "soft-capped"),
    ],
)
def test_explain(kwargs: dict[str, Any], words: str) -> None:
    q, k, v = (torch.randn(1, h, 40, 16, device=DEVICE) for h in (4, 2, 2))
    line = explain(q, k, v, backend="triton", **there(kwargs))
    assert line.startswith("triton: ")
    assert any(word in line for word in words.split("|")), line


def test_what_the_kernels_cannot_serve_is_said() -> None:
    q, k, v = (torch.randn(1, h, 40, 16, device=DEVICE) for h in (4, 2, 2))
    dense = torch.zeros(1, 1, 40, 40, device=DEVICE).requires_grad_()
    blend = Steer(blend=torch.ones(1, device=DEVICE))
    rule = Steer(spans=((0, 1, 1),), rule=Rule(torch.tensor([[1.0, 0.4]])))
    cases: list[tuple[tuple[torch.Tensor, ...], dict[str, Any], str]] = [
        ((q.double(), k.double(), v.double()), {}, "float64"),
        ((q, k.half(), v), {}, "float16"),
        ((q, k, v), {"mask": Mask(dense=dense)}, "the dense mask needs gradients"),
        ((q, k, v), {"scale": -1.0}, "scale"),
        ((q.clone().requires_grad_(), k, v), {}, "gradients"),
        ((q, k, v), {"steer": [blend, rule]}, "after a blend"),
        (tuple(torch.randn(1, 1, 4, 600, device=DEVICE) for _ in range(3)), {}, "600"),
    ]
    for tensors, kwargs, word in cases:
        with pytest.raises(BackendError, match=word):
            attention(*tensors, backend="triton", **kwargs)
        assert explain(*tensors, **kwargs).startswith("streaming: ")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(q=torch.randn(1, 3, 40, 16)), "3 query heads cannot share 2"),
        (dict(k=torch.randn(1, 2, 40, 8)), "Shapes do not fit"),
        (dict(k=torch.randn(2, 40, 16)), "k has shape"),
        (dict(v=torch.zeros(1, 2, 40, 16, dtype=torch.int64)), "v is torch.int64"),
        (dict(sinks=torch.zeros(2)), "sinks has shape"),
        (dict(mask=Mask(keys=torch.ones(1, 39, dtype=torch.bool))), "mask.keys"),
        (dict(mask=Mask(window=0)), "window"),
        (
            dict(
                request=Request(frozenset({"group_mass"}), torch.zeros(1, 39, dtype=torch.long), 2)
            ),
            "request.labels",
        ),
        (dict(request=Request(pairs={"x": torch.tensor([[[40]]])})), "pair 'x' lists number 40"),
        (
            dict(request=Request(pairs={"x": torch.zeros(1, 7, 1, dtype=torch.long)})),
            "pair 'x' has shape",
        ),
        (
            dict(request=Request(topk=1, topk_rows=torch.tensor([40]))),
            "request.topk_rows lists number 40",
        ),
        (
            dict(request=Request(received={"r": Received(torch.ones(1, 3, dtype=torch.bool))})),
            "received 'r': queries",
        ),
        (
            dict(request=Request(received={"r": Received(keys=torch.tensor([[[41]]]))})),
            "received 'r': keys",
        ),
        (dict(steer=Steer(bias=torch.zeros(1, 4, 39))), "steer.bias"),
        (dict(steer=Steer(gain=torch.zeros(1, 3, 40))), "steer.gain"),
        (
            dict(steer=Steer(labels=torch.full((1, 1, 40), 2), rule=Rule(torch.ones(1, 2)))),
            "steer.labels has groups",
        ),
        (dict(steer=Steer(spans=((0, 41, 1),), rule=Rule(torch.ones(1, 2)))), "steer.spans"),
        (dict(steer=Steer(rule=Rule(torch.ones(1, 2)))), "needs either"),
        (dict(steer=Steer(spans=((0, 1, 0),), rule=Rule(torch.ones(3, 2)))), "steer.rule.keep"),
        (dict(steer=Steer(spans=((0, 1, 0),), rule=Rule(torch.ones(1, 257)))), "257 groups"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], word: str) -> None:
    """Before any launch, the same in every backend."""
    given: dict[str, Any] = {
        name: torch.randn(1, h, 40, 16) for name, h in (("q", 4), ("k", 2), ("v", 2))
    } | change
    for name in ("triton", "streaming", "reference"):
        with pytest.raises(ValueError, match=word):
            attention(**given, backend=name)


@pytest.mark.slow
def test_no_gpu_is_an_error_of_its_own() -> None:
    """In a process without the interpreter."""
    code = (
        "import torch\nfrom interp_kernels import attention, BackendError\n"
        "x = torch.randn(1, 1, 4, 16)\n"
        "try:\n    attention(x, x, x, backend='triton')\nexcept BackendError as error:\n    "
        "print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
    )
    assert "needs a CUDA GPU" in done.stdout, done.stderr


def test_auto_prefers_the_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` asks the kernels wherever the tensors are on CUDA, and says why where they cannot
    serve."""
    q = torch.randn(1, 2, 4, 16)
    call = loose(q, q, q)
    assert dispatch._resolve("auto", call) == ("streaming", "")

    class OnCuda:
        is_cuda = True

    monkeypatch.setattr(backend, "why_not", lambda *a, **k: "")
    call = replace(call, q=OnCuda())  # type: ignore[arg-type]
    assert dispatch._resolve("auto", call) == ("triton", "")
    monkeypatch.setattr(backend, "why_not", lambda *a, **k: "of the weather")
    assert dispatch._resolve("auto", call) == ("streaming", "of the weather")


@pytest.mark.gpu
def test_vendor_calls_serve_plain_calls_and_spans() -> None:
    q, k, v = (
        torch.randn(1, 300, h, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for h in (8, 2, 2)
    )
    for kwargs in (
        dict(),
        dict(
            steer=Steer(spans=((0, 1, 1),), rule=Rule(torch.tensor([[1.0, 3.0]]), renormalise=True))
        ),
        dict(
            steer=Steer(
                spans=((0, 1, 1), (100, 200, 1)),
                rule=Rule(torch.tensor([[1.0, 0.4]]), torch.eye(2)[:1]),
            )
        ),
    ):
        line = explain(q, k, v, **there(kwargs))
        assert "cuDNN" in line or "FlashAttention" in line, line
        got = back(attention(q, k, v, **there(kwargs)))
        want = attention(*wide((q, k, v)), backend="reference", **wide(kwargs))
        torch.testing.assert_close(got.out.double(), want.out, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(got.lse.double(), want.lse, atol=2e-3, rtol=2e-3)
    cached = back(attention(q[:, :, -100:], k, v, mask=Mask(q_start=200)))
    want = attention(*wide((q[:, :, -100:], k, v)), mask=Mask(q_start=200), backend="reference")
    torch.testing.assert_close(cached.out.double(), want.out, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_a_cuda_graph_replays() -> None:
    q, k, v = (
        torch.randn(1, 512, h, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for h in (8, 2, 2)
    )
    labels = (torch.rand(1, 8, 512, device="cuda") > 0.9).long()
    steer = Steer(
        labels=labels,
        rule=Rule(
            torch.tensor([[1.0, 0.4]], device="cuda"), torch.tensor([[1.0, 0.0]], device="cuda")
        ),
    )
    request = Request(frozenset({"entropy", "max"}), received={"all": Received()})

    def run() -> tuple[torch.Tensor, ...]:
        seen = attention(q, k, v, request=request, backend="triton")
        return (
            attention(q, k, v, steer=steer, backend="triton").out,
            seen.stats["entropy"],
            seen.stats["received:all"],
        )

    want = [x.clone() for x in run()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    graph.replay()
    for x, y in zip(made, want, strict=True):
        torch.testing.assert_close(x, y)
