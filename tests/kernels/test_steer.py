"""Edits of an attention call: the reference against explicit loops, every route against the
reference, identities."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from loose import choose, loose, reference_attention, streaming_attention
from test_kernels import NoSquare, assert_same, examples, make_case

from interp_kernels import (
    Mask,
    Received,
    Request,
    Result,
)
from interp_kernels.reference import weights
from interp_kernels.request import ROW
from interp_kernels.steer import Rule, Steer
from interp_kernels.streaming import chunked, scattered, spans
from interp_kernels.streaming import route as streaming

PLAIN_ROW = frozenset(ROW) - {"pair_mass"}
BACKENDS = {"reference": reference_attention, "streaming": streaming_attention}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def uniform(draw: Any, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.rand(shape, generator=gen, dtype=torch.float64) * (high - low) + low


def either(draw: Any, *sizes: int) -> tuple[int, ...]:
    """Sizes, each whole or shared."""
    return tuple(draw(st.sampled_from([1, size])) for size in sizes)


def make_rule(draw: Any, batch: int, heads: int, lq: int, groups: int) -> Rule:
    kind = draw(st.sampled_from(["move", "drop", "renormalise", "at least"]))
    shape = (*either(draw, heads), groups)
    keep = uniform(draw, *shape, high=1.0 if kind == "move" else 2.0)
    keep[uniform(draw, *shape) < 0.25] = 0.0
    receive = None
    if kind in ("move", "at least"):
        shape = (*either(draw, heads), groups)
        receive = uniform(draw, *shape) * (uniform(draw, *shape) < 0.6)
    tests = bounds = rows = None
    if draw(st.booleans()):
        n = draw(st.integers(1, 2))
        tests, bounds = uniform(draw, n, groups, low=-1.0), uniform(draw, n, low=-0.5, high=0.3)
    if draw(st.booleans()):
        rows = uniform(draw, batch, lq) < 0.6
    return Rule(keep, receive, kind in ("renormalise", "at least"), tests, bounds, rows)


def make_spans(draw: Any, keys: int, groups: int) -> tuple[tuple[int, int, int], ...]:
    ends = [
        sorted(draw(st.tuples(st.integers(0, keys), st.integers(0, keys))))
        for _ in range(draw(st.integers(1, 3)))
    ]
    return tuple((a, b, draw(st.integers(0, groups - 1))) for a, b in ends)


def make_steer(
    draw: Any, q: torch.Tensor, k: torch.Tensor, *, softmax: bool, only: str = ""
) -> Steer:
    """A random edit of a call; `only` "spans": what the vendor route serves."""
    (batch, heads, lq, _), lk = q.shape, k.shape[2]
    fields: dict[str, Any] = {}
    want = {"spans": st.just(False)}.get(only, st.booleans())
    if draw(want):
        fields["temper"] = uniform(draw, *either(draw, batch, heads, lq), low=0.3, high=2.0)
    if draw(want):
        bias = uniform(draw, *either(draw, batch, heads), lk, low=-2.0, high=2.0)
        bias[uniform(draw, *bias.shape) < draw(st.sampled_from([0.0, 0.2, 1.0]))] = -math.inf
        fields["bias"] = bias
    if draw(st.booleans()):
        fields["blend"] = uniform(draw, *either(draw, heads))
    if draw(st.booleans()):
        fields["gain"] = uniform(draw, *either(draw, batch, heads, lq), low=-1.0, high=2.0)
    if not softmax:
        fields["sigmoid"] = draw(st.sampled_from([-3.0, 0.5]))
    elif only or draw(st.integers(0, 3)):
        groups = draw(st.integers(1, 4))
        fields["rule"] = make_rule(draw, batch, heads, lq, groups)
        if only or draw(st.booleans()):
            fields["spans"] = make_spans(draw, lk, groups)
        else:
            fields["labels"] = (uniform(draw, *either(draw, batch, heads), lk) * groups).long()
    steer = Steer(**fields)
    steer.check(batch, heads, lq, lk)
    return steer


def at(x: torch.Tensor, *index: int) -> float:
    """An element of a tensor whose dimensions of size 1 are shared."""
    return float(x[tuple(i if size > 1 else 0 for i, size in zip(index, x.shape, strict=True))])


def kept_of(mass: list[float], rule: Rule, h: int) -> list[float]:
    """What each group keeps; a visible one at least the mass that a renormalising rule gives it."""
    keep = [at(rule.keep, h, g) for g in range(rule.groups)]
    if not rule.renormalise or rule.receive is None:
        return keep
    least = [at(rule.receive, h, g) for g in range(rule.groups)]
    return [max(x, n / m) if m > 0 else x for x, n, m in zip(keep, least, mass, strict=True)]


def loop_factors(mass: list[float], sink: float, rule: Rule, h: int) -> list[float]:
    """The rule for one row, as the formula says it."""
    keep = kept_of(mass, rule, h)
    if rule.tests is not None:
        for test, bound in zip(rule.tests.tolist(), rule.bounds.tolist(), strict=True):
            if sum(x * m for x, m in zip(test, mass, strict=True)) < bound:
                return [1.0] * len(mass)
    if rule.renormalise:
        total = sum(x * m for x, m in zip(keep, mass, strict=True)) + sink
        return [x / total if total > 0 else 0.0 for x in keep]
    receive = (
        [0.0] * rule.groups
        if rule.receive is None
        else [at(rule.receive, h, g) for g in range(rule.groups)]
    )
    if not any(receive):
        return keep
    pool = sum(x * m for x, m in zip(receive, mass, strict=True))
    if pool == 0:
        return [1.0] * len(mass)
    freed = sum((1 - x) * m for x, m in zip(keep, mass, strict=True))
    return [x + r * freed / pool for x, r in zip(keep, receive, strict=True)]


def steered_loops(
    q: Any, k: Any, v: Any, mask: Mask, scale: float, softcap: Any, sinks: Any, steer: Steer
) -> Any:
    """A, out and lse of an edited call by explicit loops over single weights, numpy float64."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    batch, heads, lq, _ = q.shape
    group, lk = heads // k.shape[1], k.shape[2]
    labels = None if steer.labels is None else steer.labels
    a, lse = np.zeros((batch, heads, lq, lk)), np.full((batch, heads, lq), -np.inf)
    out = np.zeros((batch, heads, lq, v.shape[-1]))
    for b, h, i in np.ndindex(batch, heads, lq):
        logits, own = {}, None
        for j in range(lk):
            x, y = mask.q_start + i, mask.k_start + j
            seen = (y <= x or not mask.causal) and (mask.window is None or abs(x - y) < mask.window)
            seen = seen and (mask.keys is None or bool(mask.keys[b, j]))
            s = scale * float(q[b, h, i] @ k[b, h // group, j])
            s = s if softcap is None else softcap * math.tanh(s / softcap)
            s *= 1 if steer.temper is None else at(steer.temper, b, h, i)
            if mask.dense is not None:
                dense = at(mask.dense, b, h, i, j)
                seen = seen and (bool(dense) if mask.dense.dtype == torch.bool else dense > -1e29)
                s += 0 if mask.dense.dtype == torch.bool else dense
            s += 0 if steer.bias is None else at(steer.bias, b, h, j)
            own = j if seen and x == y else own
            if seen and s > -1e29:
                logits[j] = s
        row = a[b, h, i]
        if logits and steer.sigmoid is not None:
            for j, s in logits.items():
                row[j] = 1 / (1 + math.exp(-s - steer.sigmoid))
            lse[b, h, i] = math.log(row.sum())
        elif logits:
            terms = list(logits.values()) + ([] if sinks is None else [float(sinks[h])])
            top = max(terms)
            lse[b, h, i] = top + math.log(sum(math.exp(s - top) for s in terms))
            for j, s in logits.items():
                row[j] = math.exp(s - lse[b, h, i])
        if steer.rule is not None and (steer.rule.rows is None or bool(steer.rule.rows[b, i])):
            of = [0] * lk
            for start, stop, g in steer.spans:
                of[start:stop] = [g] * (stop - start)
            if labels is not None:
                of = [int(at(labels, b, h, j)) for j in range(lk)]
            mass = [sum(row[j] for j in range(lk) if of[j] == g) for g in range(steer.rule.groups)]
            sink = 0.0 if sinks is None or not logits else math.exp(float(sinks[h]) - lse[b, h, i])
            factor = loop_factors(mass, sink, steer.rule, h)
            for j in range(lk):
                row[j] *= factor[of[j]]
        if steer.blend is not None and own is not None:
            u = at(steer.blend, h)
            row *= 1 - u
            row[own] += u
        out[b, h, i] = (
            row @ v[b, h // group] * (1 if steer.gain is None else at(steer.gain, b, h, i))
        )
    return a, out, lse


def drawn(
    data: Any, dtype: torch.dtype, largest: int, **how: Any
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """As `make_case`, with an edit."""
    (q, k, v), kwargs = make_case(data.draw, dtype, largest)
    softmax = "sinks" in kwargs or data.draw(st.integers(0, 4)) > 0
    if not softmax:
        kwargs.pop("request", None)
    kwargs["steer"] = make_steer(data.draw, q, k, softmax=softmax, **how)
    return (q, k, v), kwargs


def reference_of(q: Any, k: Any, v: Any, kwargs: dict[str, Any]) -> tuple[Result, torch.Tensor]:
    """The reference's result in float64, and its final weights."""
    kwargs = dict(kwargs)
    if "sinks" in kwargs:
        kwargs["sinks"] = kwargs["sinks"].double()
    want = reference_attention(q.double(), k.double(), v.double(), **kwargs)
    kwargs.pop("request", None)
    return want, weights(q.double(), k.double(), **kwargs)


@pytest.mark.slow
@examples(250)
@given(st.data())
def test_reference_is_the_definition(data: Any) -> None:
    (q, k, v), kwargs = drawn(data, torch.float64, 6)
    kwargs.pop("request", None)
    got = reference_attention(q, k, v, **kwargs)
    a, out, lse = steered_loops(q, k, v, **{"softcap": None, "sinks": None, **kwargs})
    np.testing.assert_allclose(weights(q, k, **kwargs).numpy(), a, atol=1e-12)
    np.testing.assert_allclose(got.out.numpy(), out, atol=1e-12)
    np.testing.assert_allclose(got.lse.numpy(), lse, atol=1e-12)


@pytest.mark.slow
@examples(400)
@given(st.data())
def test_streaming_equals_reference_float64(data: Any) -> None:
    (q, k, v), kwargs = drawn(data, torch.float64, 40)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(
            st.booleans()
        ):  # several blocks of batch entries and heads, several chunks of rows
            patch.setattr(chunked, "_BUDGET", data.draw(st.sampled_from([50, 400, 2000])))
            patch.setattr(chunked, "_MIN_ROWS", 3)
            patch.setattr(chunked, "_MAX_ROWS", 7)
        got = streaming_attention(q, k, v, **kwargs)
    assert_same(got, *reference_of(q, k, v, kwargs), 1e-9, kwargs.get("request"))


@examples(100)
@given(st.data())
def test_streaming_equals_reference_float32(data: Any) -> None:
    (q, k, v), kwargs = drawn(data, torch.float32, 200)
    got = streaming_attention(q, k, v, **kwargs)
    assert_same(got, *reference_of(q, k, v, kwargs), 2e-5, kwargs.get("request"))


@pytest.mark.slow
@examples(250)
@given(st.data())
def test_vendor_spans_equal_reference(data: Any) -> None:
    """The grouped-state route for every shape it serves, each vendor call of few or many
    columns."""
    (q, k, v), kwargs = make_case(data.draw, torch.float64, 40)
    for name in ("softcap", "request"):
        kwargs.pop(name, None)
    kwargs["mask"] = replace(kwargs["mask"], window=None, dense=None, k_start=0)
    kwargs["steer"] = make_steer(data.draw, q, k, softmax=True, only="spans")
    route = choose(q, k, v, **kwargs)
    mask = kwargs["mask"]
    inside = mask.q_start + q.shape[2] <= k.shape[2]  # no query after the last key
    assert bool(route.shape) == (not mask.causal or inside or mask.q_start >= k.shape[2] - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "NARROW", data.draw(st.sampled_from([0, 2, 64])))
        patch.setattr(spans, "_BUDGET", data.draw(st.sampled_from([1, 1 << 18])))
        got = streaming_attention(q, k, v, **kwargs)
    assert_same(got, *reference_of(q, k, v, kwargs), 1e-9, kwargs.get("request"))


@pytest.mark.slow
@examples(250)
@given(st.data())
def test_vendor_scattered_equals_reference(data: Any) -> None:
    """Keys anywhere, a labelling a head or a sample: hidden from the vendor's call, or listed, in
    few rows or many."""
    (q, k, v), kwargs = make_case(data.draw, torch.float64, 40)
    for name in ("softcap", "request"):
        kwargs.pop(name, None)
    kwargs["mask"] = replace(kwargs["mask"], window=None, dense=None, k_start=0)
    (batch, heads, lq, _), lk, groups = q.shape, k.shape[2], data.draw(st.integers(1, 3))
    chance = uniform(data.draw, *either(data.draw, batch, heads), lk)
    labels = (chance < data.draw(st.sampled_from([0.1, 0.5, 1.0]))) * (
        uniform(data.draw, lk) * groups
    ).long()
    steer = Steer(labels=labels.long(), rule=make_rule(data.draw, batch, heads, lq, groups))
    if data.draw(st.booleans()):
        steer = replace(
            steer,
            temper=uniform(data.draw, *either(data.draw, batch, heads, lq), low=0.3, high=2.0),
        )
    steer.check(batch, heads, lq, lk)
    kwargs["steer"] = steer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_FEW_ROWS", 0)
        patch.setattr(scattered, "_MAX_HIDDEN", 3)
        patch.setattr(scattered, "_LISTED", data.draw(st.sampled_from([1, 4, 1000])))
        patch.setattr(scattered, "_BUDGET", data.draw(st.sampled_from([1, 1 << 20])))
        route = choose(q, k, v, **{**kwargs, "request": None})
        event(f"scattered: {route.plan is not None}")
        got = streaming_attention(q, k, v, **kwargs)
    assert_same(got, *reference_of(q, k, v, kwargs), 1e-9)


def test_listed_keys_seen_from_beyond_the_last_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sample has fewer listed keys than another, its list ends in places that stand for no
    key; a query after the last key sees none of them."""
    monkeypatch.setattr(streaming, "_FEW_ROWS", 0)
    monkeypatch.setattr(scattered, "_LISTED", 1)
    q, k, v = (torch.randn(2, 1, n, 3, dtype=torch.float64) for n in (2, 6, 6))
    keys = torch.tensor([[False] * 4 + [True] * 2, [False] * 3 + [True] * 3])
    labels = torch.zeros(1, 1, 6, dtype=torch.long)
    steer = Steer(labels=labels, rule=Rule(torch.tensor([[1.9]], dtype=torch.float64)))
    kwargs = {"mask": Mask(q_start=6, keys=keys), "scale": 0.2, "steer": steer}
    assert choose(q, k, v, **kwargs).plan is not None
    got = streaming_attention(q, k, v, **kwargs)
    assert_same(got, *reference_of(q, k, v, kwargs), 1e-9)


@examples(150)
@given(st.data())
def test_renormalising_rules_are_a_bias_where_the_lse_is_not_read(data: Any) -> None:
    (q, k, v), kwargs = make_case(data.draw, torch.float64, 40)
    kwargs.pop("request", None)
    batch, heads, lk = *q.shape[:2], k.shape[2]
    groups = data.draw(st.integers(1, 3))
    rules = []
    for _ in range(data.draw(st.integers(1, 2))):
        keep = uniform(data.draw, *either(data.draw, heads), groups, high=2.0)
        keep[uniform(data.draw, *keep.shape) < 0.25] = 0.0
        rules.append(Rule(keep, renormalise=True))
    where: dict[str, Any] = {"spans": make_spans(data.draw, lk, groups)}
    if data.draw(st.booleans()):
        where = {
            "labels": (uniform(data.draw, *either(data.draw, batch, heads), lk) * groups).long()
        }
    steer = Steer(rule=tuple(rules), **where)
    if data.draw(st.booleans()):
        bias = uniform(data.draw, 1, heads, lk, low=-2.0, high=2.0)
        steer = replace(
            steer, bias=bias.masked_fill(uniform(data.draw, 1, heads, lk) < 0.2, -math.inf)
        )
    prepared = streaming._prepared(loose(q, k, v, steer=steer, request=Request(lse=False))).steer
    assert not prepared.rules and prepared.bias is not None
    got = streaming_attention(q, k, v, steer=steer, request=Request(lse=False), **kwargs)
    want = reference_attention(q, k, v, steer=steer, **kwargs)
    torch.testing.assert_close(got.out, want.out, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, -3.0, 6.0, 0.0])])
@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize("shape", ["square", "prefix", "decode", "static", "full"])
def test_spans_equal_labels(shape: str, padding: str, sinks: torch.Tensor | None) -> None:
    """Spans, hidden and listed keys, and chunks: four ways to one answer."""
    lq, lk = {
        "square": (300, 300),
        "prefix": (90, 300),
        "decode": (1, 300),
        "static": (150, 300),
        "full": (70, 300),
    }[shape]
    start = 0 if shape in ("square", "static") else lk - lq
    q, k, v = torch.randn(2, 4, lq, 16), torch.randn(2, 2, lk, 16), torch.randn(2, 2, lk, 16)
    column = torch.arange(lk)
    edge = torch.tensor([[7], [210]])
    keys = {"": None, "left": column >= edge, "right": column < edge}[padding]
    mask = Mask(causal=shape != "full", q_start=start, keys=keys)
    rule = Rule(torch.tensor([[1.0, 0.3, 0.6]]), torch.tensor([[1.0, 0.0, 2.0]]))
    cuts = ((0, 1, 1), (20, 90, 2), (200, 280, 1), (290, 291, 2))
    by_span = Steer(spans=cuts, rule=rule)
    by_label = Steer(labels=by_span.labels_of(lk, q.device), rule=rule)
    kwargs: dict[str, Any] = {"mask": mask, "scale": 0.4, "sinks": sinks}
    assert choose(q, k, v, steer=by_span, **kwargs).shape
    assert bool(choose(q, k, v, steer=by_label, **kwargs).plan) == (lq > 32)
    want = reference_attention(q.double(), k.double(), v.double(), steer=by_label, **kwargs)
    for steer, part in ((by_span, 4), (by_label, 4), (by_label, 1), (by_label, 300)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                scattered, "_LISTED", part
            )  # 1: all listed, or chunks; 300: all hidden, or chunks
            got = streaming_attention(q, k, v, steer=steer, **kwargs)
        torch.testing.assert_close(got.out.double(), want.out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.lse.double(), want.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 200, 16).to(dtype) for _ in range(3))
    rule = Rule(torch.tensor([[1.0, 0.3]]), torch.tensor([[1.0, 0.0]]))
    for steer in (
        Steer(spans=((0, 1, 1), (50, 150, 1)), rule=rule, blend=torch.tensor([0.2])),
        Steer(labels=torch.randint(0, 2, (1, 2, 200)), rule=rule, gain=torch.rand(1, 2, 1)),
    ):
        got, want = (
            run(q, k, v, mask=Mask(), scale=0.25, steer=steer)
            for run in (streaming_attention, reference_attention)
        )
        assert got.out.dtype == dtype
        assert got.lse.dtype == torch.float32
        torch.testing.assert_close(got.out, want.out, atol=0.03, rtol=0.03)


def leaves_of(kwargs: dict[str, Any]) -> list[torch.Tensor]:
    steer = kwargs["steer"]
    return steer.tensors + ([kwargs["sinks"]] if "sinks" in kwargs else [])


@examples(50)
@given(st.data())
def test_gradients_equal_reference(data: Any) -> None:
    tensors, kwargs = drawn(data, torch.float64, 20)
    inputs = data.draw(st.booleans())  # or only the edit's parameters
    leaves = [x.requires_grad_() for x in [*(tensors if inputs else ()), *leaves_of(kwargs)]]
    if not leaves:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_ROWS", 6)
        results = [run(*tensors, **kwargs) for run in BACKENDS.values()]
        target = torch.randn_like(results[0].out)
        losses = [(r.out * target).sum() for r in results]
        if not all(x.requires_grad for x in losses):
            return  # no row sees a key, say
        want, got = (torch.autograd.grad(x, leaves, allow_unused=True) for x in losses)
    for leaf, x, y in zip(leaves, got, want, strict=True):
        x, y = (torch.zeros_like(leaf) if g is None else g for g in (x, y))
        torch.testing.assert_close(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["move", "drop", "renormalise", "at least", "spans", "sigmoid"])
def test_gradcheck(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_ROWS", 2)

    def leaf(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, dtype=torch.float64) * 0.6 + 0.2).requires_grad_()

    shapes = {
        "q": (1, 2, 5, 3),
        "k": (1, 1, 5, 3),
        "v": (1, 1, 5, 3),
        "temper": (1, 2, 5),
        "bias": (1, 2, 5),
    }
    shapes |= {"blend": (2,), "gain": (1, 1, 5)}
    if kind != "sigmoid":
        shapes |= {"sinks": (2,), "keep": (2, 3), "receive": (1, 3)}
    where: dict[str, Any] = {"labels": torch.tensor([[[0, 1, 0, 2, 1], [1, 0, 2, 2, 0]]])}
    if kind == "spans":
        where = {"spans": ((0, 1, 1), (2, 4, 2))}

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = dict(zip(shapes, values, strict=True))
        fields: dict[str, Any] = {name: x[name] for name in ("temper", "bias", "blend", "gain")}
        if kind == "sigmoid":
            fields["sigmoid"] = -0.5
        else:
            receive = x["receive"] if kind in ("move", "at least", "spans") else None
            shares = kind in ("renormalise", "at least")
            fields |= {"rule": Rule(x["keep"], receive, shares), **where}
        q, k, v = x["q"], x["k"], x["v"]
        got = streaming_attention(
            q,
            k,
            v,
            mask=Mask(),
            scale=1.0,
            softcap=2.0,
            sinks=x.get("sinks"),
            steer=Steer(**fields),
        )
        return got.out, got.lse

    assert torch.autograd.gradcheck(run, [leaf(*shape) for shape in shapes.values()])


def test_parameters_alone_may_want_gradients() -> None:
    q, k, v = (torch.randn(1, 2, 40, 4, dtype=torch.float64) for _ in range(3))
    keep = torch.tensor([[1.0, 0.3]], dtype=torch.float64, requires_grad=True)
    gain, blend = (
        torch.rand(1, 2, 1, dtype=torch.float64, requires_grad=True),
        torch.rand(2, requires_grad=True),
    )
    for steer in (
        Steer(spans=((0, 3, 1),), rule=Rule(keep, torch.tensor([[1.0, 0.0]]))),
        Steer(gain=gain, blend=blend),
    ):
        got, want = (
            torch.autograd.grad(
                run(q, k, v, mask=Mask(), scale=0.5, steer=steer).out.square().sum(),
                steer.tensors[:1],
            )
            for run in BACKENDS.values()
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "what", ["spans", "labels", "listed", "bias", "blend", "statistics", "sigmoid", "grad"]
)
def test_no_square_matrix(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, heads = 2048, 2
    q, k, v = (torch.randn(1, heads, size, 16) for _ in range(3))
    labels = torch.randint(0, 2, (1, heads, size))
    keep = torch.tensor([[1.0, 0.4]], requires_grad=what == "grad")
    rule = Rule(keep, torch.tensor([[1.0, 0.0]]))
    steer = {
        "spans": Steer(spans=((0, 1, 1), (700, 760, 1), (1000, 1500, 1)), rule=rule),
        "blend": Steer(blend=torch.rand(heads), gain=torch.rand(1, heads, size)),
        "sigmoid": Steer(
            sigmoid=-3.0, temper=torch.rand(1, heads, size), bias=torch.randn(1, heads, size)
        ),
        "listed": Steer(labels=(torch.rand(1, heads, size) < 0.1).long(), rule=rule),
        "bias": Steer(bias=torch.randn(1, heads, size), temper=torch.rand(1, 1, size)),
    }.get(
        what,
        Steer(labels=labels, rule=rule, blend=torch.rand(heads), temper=torch.rand(1, 1, size)),
    )
    request = None
    if what == "statistics":
        request = Request(
            names=PLAIN_ROW,
            labels=labels[:, 0],
            n_groups=2,
            cap=64,
            topk=4,
            pairs={"previous": torch.arange(-1, size - 1)[None, :, None]},
            received={
                "all": Received(),
                "band": Received(band=(1, 32)),
                "most": Received(reduce="max"),
            },
        )
    monkeypatch.setattr(chunked, "_BUDGET", size * size // 8)
    with NoSquare(size * size // 4):
        got = streaming_attention(q, k, v, mask=Mask(), scale=0.25, request=request, steer=steer)
        if what == "grad":
            got.out.sum().backward()
