"""Several edits of one call: the reference against their definition one after the other, every
route against it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loose import reference_attention, streaming_attention
from test_fused import DEVICE, back, examples, fused_case, there, wide
from test_kernels import assert_same, make_case
from test_steer import at, either, kept_of, loop_factors, make_rule, make_spans, uniform

from interp_kernels import (
    BackendError,
    Mask,
    Request,
    Rule,
    Steer,
    attention,
    explain,
)
from interp_kernels.compose import fuse
from interp_kernels.reference import weights
from interp_kernels.streaming import chunked
from interp_kernels.streaming import route as streaming

PAIR = Rule(torch.tensor([[1.0, 0.4]]), torch.tensor([[1.0, 0.0]]))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def narrow(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors inside in `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(narrow(v, dtype) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return replace(
            value,
            **{f.name: narrow(getattr(value, f.name), dtype) for f in dataclasses.fields(value)},
        )
    return value


def make_edits(
    draw: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    groups: int = 4,
    blends: bool = True,
    where: str = "",
) -> tuple[Steer, ...]:
    """Two or three random edits, rules over spans and labels mixed."""
    (batch, heads, lq, _), lk = q.shape, k.shape[2]
    made = []
    count = draw(st.integers(2, 3))
    for i in range(count):
        fields: dict[str, Any] = {}
        if not where and draw(st.integers(0, 3)) == 0:
            fields["temper"] = uniform(draw, *either(draw, batch, heads, lq), low=0.5, high=1.5)
        if not where and draw(st.integers(0, 3)) == 0:
            bias = uniform(draw, *either(draw, batch, heads), lk, low=-1.0, high=1.0)
            fields["bias"] = bias.masked_fill(uniform(draw, *bias.shape) < 0.15, -math.inf)
        if draw(st.integers(0, 3)) == 0:
            fields["gain"] = uniform(draw, *either(draw, batch, heads, lq), low=-1.0, high=2.0)
        if (blends or i == count - 1) and draw(st.integers(0, 3)) == 0:
            fields["blend"] = uniform(draw, *either(draw, heads))
        if draw(st.integers(0, 4)):
            n = draw(st.sampled_from([1, *[n for n in range(2, groups + 1) for _ in range(3)]]))
            rules = tuple(
                make_rule(draw, batch, heads, lq, n)
                for _ in range(draw(st.sampled_from([1, 1, 2])))
            )
            fields["rule"] = rules if draw(st.booleans()) or len(rules) > 1 else rules[0]
            if where == "spans" or draw(st.booleans()):
                fields["spans"] = make_spans(draw, lk, n)
            else:
                fields["labels"] = (uniform(draw, *either(draw, batch, heads), lk) * n).long()
        made.append(Steer(**fields))
    return tuple(made)


def definition(
    q: Any,
    k: Any,
    v: Any,
    steers: Any,
    mask: Mask,
    scale: float,
    softcap: Any = None,
    sinks: Any = None,
) -> Any:
    """A, out and lse in float64: logits of all edits, softmax, then each edit's rules and blend,
    row by row."""
    (batch, heads, lq, _), lk, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    s = scale * torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(group, 1))
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    x, y = torch.arange(lq)[:, None] + mask.q_start, torch.arange(lk) + mask.k_start
    seen = (y <= x) | (not mask.causal)
    seen = seen & ((x - y).abs() < (mask.window or 10**9))
    seen = seen.expand(batch, heads, -1, -1)
    if mask.keys is not None:
        seen = seen & mask.keys[:, None, None]
    for steer in steers:
        s = s if steer.temper is None else s * steer.temper[..., None]
    if mask.dense is not None:
        dense = mask.dense if mask.dense.dtype == torch.bool else mask.dense > -1e29
        seen = seen & dense
        s = (
            s
            if mask.dense.dtype == torch.bool
            else s + mask.dense.double().masked_fill(~dense, 0.0)
        )
    shown = seen
    for steer in steers:
        if steer.bias is not None:
            kept = steer.bias[:, :, None] > -1e29
            s, shown = s + steer.bias[:, :, None].masked_fill(~kept, 0.0), shown & kept
    terms = s.masked_fill(~shown, -math.inf)
    if sinks is not None:
        terms = torch.cat([terms, sinks.double()[None, :, None, None].expand(batch, -1, lq, 1)], -1)
    none = ~shown.any(-1)
    lse = torch.logsumexp(terms.masked_fill(none[..., None], 0.0), -1).masked_fill(none, -math.inf)
    a = (terms[..., :lk] - lse[..., None]).exp().masked_fill(none[..., None], 0.0).numpy()
    out = np.zeros((batch, heads, lq, v.shape[-1]))
    for b, h, i in np.ndindex(batch, heads, lq):
        row, gone = a[b, h, i], 0.0
        if sinks is not None and not none[b, h, i]:
            gone = math.exp(float(sinks[h]) - float(lse[b, h, i]))
        gain = 1.0
        for steer in steers:
            of = [0] * lk
            for start, stop, g in steer.spans:
                of[start:stop] = [g] * (stop - start)
            if steer.labels is not None:
                of = [int(at(steer.labels, b, h, j)) for j in range(lk)]
            given = (
                steer.rule
                if isinstance(steer.rule, tuple)
                else ()
                if steer.rule is None
                else (steer.rule,)
            )
            for rule in given:
                if rule.rows is not None and not rule.rows[b, i]:
                    continue
                mass = [sum(row[j] for j in range(lk) if of[j] == g) for g in range(rule.groups)]
                factor = loop_factors(mass, gone, rule, h)
                row *= np.array([factor[g] for g in of])
                if rule.renormalise and any(
                    f != 1 for f in factor
                ):  # the sink logit's share is normalised too
                    keep = kept_of(mass, rule, h)
                    kept = sum(x * m for x, m in zip(keep, mass, strict=True))
                    gone = gone / (kept + gone) if kept + gone > 0 else gone
            own = mask.q_start + i - mask.k_start
            if steer.blend is not None and 0 <= own < lk and seen[b, h, i, own]:
                u = at(steer.blend, h)
                row *= 1 - u
                row[own] += u
                gone *= 1 - u
            gain *= 1.0 if steer.gain is None else at(steer.gain, b, h, i)
        out[b, h, i] = gain * (row @ v[b, h // group].numpy())
    return a, out, lse.numpy()


@pytest.mark.slow
@examples(150)
@given(st.data())
def test_reference_is_the_definition(data: Any) -> None:
    (q, k, v), kwargs = make_case(data.draw, torch.float64, 6)
    kwargs.pop("request", None)
    steers = make_edits(data.draw, q, k)
    a, out, lse = definition(q, k, v, steers, **kwargs)
    got = attention(q, k, v, steer=steers, backend="reference", **kwargs)
    np.testing.assert_allclose(weights(q, k, steer=steers, **kwargs).numpy(), a, atol=1e-12)
    np.testing.assert_allclose(got.out.numpy(), out, atol=1e-12)
    np.testing.assert_allclose(got.lse.numpy(), lse, atol=1e-12)


@pytest.mark.slow
@examples(250)
@given(st.data())
def test_streaming_equals_reference(data: Any) -> None:
    (q, k, v), kwargs = make_case(data.draw, torch.float64, 30)
    where = data.draw(st.sampled_from(["", "spans"]))
    steers = make_edits(data.draw, q, k, where=where, blends=not where)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(
            st.booleans()
        ):  # several blocks of batch entries and heads, several chunks of rows
            patch.setattr(chunked, "_BUDGET", data.draw(st.sampled_from([50, 400, 2000])))
            patch.setattr(chunked, "_MIN_ROWS", 3)
            patch.setattr(chunked, "_MAX_ROWS", 7)
        got = attention(q, k, v, steer=steers, backend="streaming", **kwargs)
    want = attention(q, k, v, steer=steers, backend="reference", **kwargs)
    a = weights(q, k, steer=steers, **{n: x for n, x in kwargs.items() if n != "request"})
    assert_same(got, want, a, 1e-9, kwargs.get("request"))


@pytest.mark.slow
@examples(40)
@given(st.data())
def test_kernels_equal_reference(data: Any) -> None:
    """Whatever fuses into one edit of up to 8 groups; the rest is refused in words."""
    tensors, kwargs = fused_case(data.draw, torch.float32, 24)
    q, k, _ = tensors
    kwargs.pop("request", None)
    steers = narrow(
        make_edits(data.draw, q, k, groups=2, blends=data.draw(st.integers(0, 4)) == 0),
        torch.float32,
    )
    left = fuse(steers, k.shape[2])
    if len(left) > 1 or (left and left[0].groups > 8):
        with pytest.raises(BackendError, match=r"after a blend|groups of keys"):
            attention(*there(tensors), steer=there(steers), backend="triton", **there(kwargs))
        return
    got = back(attention(*there(tensors), steer=there(steers), backend="triton", **there(kwargs)))
    want = attention(*wide(tensors), steer=wide(steers), backend="reference", **wide(kwargs))
    torch.testing.assert_close(got.out.double(), want.out, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(got.lse.double(), want.lse, atol=5e-5, rtol=5e-5)


@examples(60)
@given(st.data())
def test_gradients_equal_reference(data: Any) -> None:
    tensors, kwargs = make_case(data.draw, torch.float64, 14)
    kwargs.pop("request", None)
    steers = make_edits(data.draw, tensors[0], tensors[1])
    inputs = tensors if data.draw(st.booleans()) else ()
    leaves = [x.requires_grad_() for x in [*inputs, *(t for s in steers for t in s.tensors)]]
    if not leaves:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_ROWS", 5)
        outs = [
            attention(*tensors, steer=steers, backend=name, **kwargs).out
            for name in ("streaming", "reference")
        ]
        target = torch.randn(
            outs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        if not all(out.requires_grad for out in outs):
            return  # no row sees a key, say
        grads = [
            torch.autograd.grad((out * target).sum(), leaves, allow_unused=True) for out in outs
        ]
    for leaf, x, y in zip(leaves, *grads, strict=True):
        x, y = (torch.zeros_like(leaf) if g is None else g for g in (x, y))
        torch.testing.assert_close(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 33])
def test_gradients_of_two_rules_through_the_kernels(queries: int) -> None:
    gen = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(2, h, n, 16, generator=gen).to(DEVICE)
        for h, n in ((4, queries), (2, 33), (2, 33))
    )
    leaves = [
        x.to(DEVICE).requires_grad_()
        for x in (
            torch.rand(4, 2, generator=gen),
            torch.tensor([[1.0, 0.2, 0.9]]),
            torch.rand(4, generator=gen),
        )
    ]
    column = torch.arange(33, device=DEVICE)[None, None]
    steers = [
        Steer(labels=column % 2, rule=Rule(leaves[0], torch.tensor([[1.0, 0.0]], device=DEVICE))),
        Steer(
            spans=((0, 1, 1), (10, 20, 2)), rule=Rule(leaves[1], renormalise=True), blend=leaves[2]
        ),
    ]
    mask, grads = Mask(q_start=33 - queries), []
    assert "2 rules, weighted sum" in explain(q, k, v, mask=mask, steer=steers, backend="triton")
    for name in ("triton", "reference"):
        out = attention(q, k, v, mask=mask, steer=steers, backend=name).out
        target = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
        grads.append(torch.autograd.grad((out * target).sum(), leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@examples(100)
@given(st.data())
def test_fuse(data: Any) -> None:
    """Idempotent; group 0 is where all have group 0; a blend parts what comes after it; spans stay
    spans."""
    (q, k, _), _ = make_case(data.draw, torch.float64, 12)
    (batch, heads, lq, _), lk = q.shape, k.shape[2]
    steers = make_edits(data.draw, q, k)
    left = fuse(steers, lk)
    again = fuse(left, lk)
    assert len(again) == len(left)
    assert all(x is y or vars(x).keys() == vars(y).keys() for x, y in zip(again, left, strict=True))
    for one in left:
        one.check(batch, heads, lq, lk)
    raises = any(r.renormalise and r.receive is not None for one in steers for r in one.rules)
    assert raises or all(one.blend is not None for one in left[:-1])
    assert all(one.temper is None and one.bias is None for one in left[1:])
    assert all(one.gain is None for one in left[:-1])
    ruled = [one for one in steers if one.rule is not None]
    assert sum(len(one.rules) for one in left) == sum(len(one.rules) for one in ruled)
    if len(left) == 1 and ruled:
        zero = torch.ones(1, 1, lk, dtype=torch.bool)
        for one in ruled:
            zero = zero & (one.labels_of(lk, q.device) == 0)
        got = left[0].labels_of(lk, q.device) == 0
        assert torch.equal(*torch.broadcast_tensors(got, zero))
        assert bool(left[0].spans) == all(one.spans for one in ruled)


def test_what_fuse_makes_of_a_few() -> None:
    spans, labels = (
        Steer(spans=((0, 1, 1),), rule=PAIR),
        Steer(labels=torch.arange(6)[None, None] % 2, rule=PAIR),
    )
    other = Steer(spans=((0, 3, 1),), rule=PAIR, gain=torch.full((1, 1, 1), 2.0))
    assert fuse(None, 6) == fuse([Steer()], 6) == ()
    assert fuse([spans], 6) == fuse([spans, Steer()], 6) == (spans,)
    (both,) = fuse([spans, other], 6)
    assert both.spans == ((0, 1, 1), (1, 3, 2))
    assert torch.equal(
        torch.cat([rule.keep for rule in both.rules]),
        torch.tensor([[1.0, 0.4, 1.0], [1.0, 0.4, 0.4]]),
    )
    (same,) = fuse([labels, labels], 6)
    assert same.labels is labels.labels
    assert same.groups == 2
    (mixed,) = fuse([labels, spans], 6)
    assert mixed.labels is not None
    assert mixed.labels.flatten().tolist() == [1, 2, 0, 2, 0, 2]
    blend = Steer(blend=torch.tensor([0.5]))
    assert len(fuse([spans, blend], 6)) == 1
    assert len(fuse([blend, spans], 6)) == len(fuse([spans, blend, blend, labels], 6)) == 2
    (two,) = fuse([blend, blend], 6)
    assert two.blend is not None
    assert two.blend.tolist() == [0.75]
    many = Steer(labels=torch.zeros(1, 1, 6, dtype=torch.long), rule=Rule(torch.ones(1, 200)))
    assert len(fuse([many, labels], 6)) == 2
    half = torch.finfo(torch.float16).min
    (hidden,) = fuse(
        [
            Steer(bias=torch.full((1, 1, 6), half, dtype=torch.float16)),
            Steer(bias=torch.ones(1, 1, 6)),
        ],
        6,
    )
    assert hidden.bias is not None
    assert torch.equal(hidden.bias, torch.full((1, 1, 6), -math.inf))


def test_receivers_without_keys_still_receive() -> None:
    """A rule's only receiver has no key at all: rows stay as they are, fused with another rule or
    not."""
    q, k, v = (torch.randn(1, 2, 8, 4, dtype=torch.float64) for _ in range(3))
    nobody = Steer(
        spans=((0, 1, 1),),
        rule=Rule(torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0]])),
    )
    drop = Steer(spans=((2, 4, 1),), rule=Rule(torch.tensor([[1.0, 0.5]])))
    want = attention(q, k, v, steer=drop, backend="reference").out
    for steers in ([nobody, drop], [drop, nobody]):
        for name in ("reference", "streaming"):
            torch.testing.assert_close(attention(q, k, v, steer=steers, backend=name).out, want)


def test_many_groups() -> None:
    """More than a tile of 16 in one product; more than 8 are not for the kernels."""
    q, k, v = (torch.randn(2, h, 40, 4) for h in (4, 2, 2))
    steer = Steer(
        labels=torch.randint(0, 40, (2, 4, 40)), rule=Rule(torch.rand(4, 40), torch.rand(1, 40))
    )
    got, want = (
        attention(q, k, v, steer=steer, backend=name).out for name in ("streaming", "reference")
    )
    torch.testing.assert_close(got, want)
    with pytest.raises(BackendError, match="40 groups"):
        attention(*there((q, k, v)), steer=there(steer), backend="triton")


def test_sigmoid_goes_alone() -> None:
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    sigmoid, temper = Steer(sigmoid=-1.0), Steer(temper=torch.full((1, 1, 1), 2.0))
    for name, run in (("reference", reference_attention), ("streaming", streaming_attention)):
        got = attention(q, k, v, steer=[temper, sigmoid, temper], backend=name)
        want = attention(
            q, k, v, steer=Steer(sigmoid=-1.0, temper=torch.full((1, 1, 1), 4.0)), backend=name
        )
        torch.testing.assert_close(got.out, want.out)
        for other in (Steer(blend=torch.ones(2)), Steer(spans=((0, 1, 1),), rule=PAIR), sigmoid):
            with pytest.raises(ValueError, match="beside it"):
                attention(q, k, v, steer=[sigmoid, other], backend=name)
            with pytest.raises(ValueError, match="beside it"):
                run(q, k, v, mask=Mask(), scale=1.0, steer=[other, sigmoid])


def test_explained_and_checked() -> None:
    q, k, v = (torch.randn(1, 2, 300, 4) for _ in range(3))
    one, two = Steer(spans=((0, 1, 1),), rule=PAIR), Steer(spans=((0, 150, 1),), rule=PAIR)
    assert "merged by log-sum-exp and the rule" in explain(
        q, k, v, steer=[one, two], backend="streaming"
    )
    blend = Steer(blend=torch.ones(1))
    assert "after a blend" in explain(q, k, v, steer=[blend, two], backend="streaming")
    request = Request(frozenset({"entropy"}))
    assert "statistics of edited" in explain(
        q, k, v, steer=[one, two], request=request, backend="streaming"
    )
    with pytest.raises(ValueError, match=r"Edit 2: steer\.bias"):
        attention(q, k, v, steer=[one, Steer(bias=torch.ones(1, 1, 7))])
    for bad, word in (
        (Steer(spans=((0, 1, 1),), rule=()), "empty sequence"),
        (Steer(spans=((0, 1, 1),), rule=(PAIR, Rule(torch.ones(1, 3)))), "share their groups"),
        (
            Steer(spans=((0, 1, 1),), rule=(PAIR, replace(PAIR, bounds=torch.ones(1)))),
            "go together",
        ),
        (
            Steer(spans=((0, 1, 1),), rule=(PAIR, replace(PAIR, rows=torch.ones(1, 7)))),
            r"steer\.rule\.rows",
        ),
    ):
        with pytest.raises(ValueError, match=word):
            attention(q, k, v, steer=bad)
