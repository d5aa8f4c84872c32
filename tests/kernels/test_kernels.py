"""interp_kernels: the reference against explicit loops, streaming against the reference, memory,
gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from interp_kernels import (
    BackendError,
    Mask,
    Received,
    Request,
    Result,
    attention,
    explain,
    masking,
)
from interp_kernels.reference import weights
from interp_kernels.request import ROW
from interp_kernels.streaming import chunked

PLAIN_ROW = frozenset(ROW) - {"pair_mass"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """Thousands of tiny operations: a second thread only waits at barriers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )


def make_case(
    draw: Any, dtype: torch.dtype, largest: int = 40
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """A random attention call of any kind the contract knows: (q, k, v), keyword arguments."""
    gen = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    batch, kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    d = draw(st.sampled_from([3, 8]))
    d_v = draw(st.sampled_from([d, d, 5, 11]))
    kind = draw(
        st.sampled_from(
            ["square", "square", "cached", "decode", "rolled", "static", "early", "cross"]
        )
    )
    lq = 1 if kind == "decode" else draw(st.integers(1, largest))
    past = draw(st.integers(1, largest))
    q_start = k_start = 0
    lk = lq
    window = draw(st.sampled_from([None, None, 1, 4, 9]))
    if kind in ("cached", "decode"):
        q_start, lk = past, lq + past
    elif kind == "rolled":  # a sliding-window cache: column 0 stands at slot k_start
        window = window or 5
        q_start, k_start = past + window, past + 1
        lk = q_start + lq - k_start
    elif kind == "static":  # the cache has room after the last query
        lk = lq + past
    elif kind == "early":  # queries before the first key see nothing
        k_start, lk = min(past, 6), past
    elif kind == "cross":
        lk = past
    causal = kind != "cross" and draw(st.integers(0, 5)) > 0
    pads = {}
    side = draw(st.sampled_from(["", "", "left", "right", "holes"]))
    if side:
        lengths = torch.randint(0, lk + 1, (batch,), generator=gen)
        column = torch.arange(lk)
        keys = {
            "left": column >= lengths[:, None],
            "right": column < lengths[:, None],
            "holes": torch.rand(batch, lk, generator=gen) > 0.3,
        }[side]
        pads = {
            "keys": keys,
            "queries": keys[:, :lq] if lk == lq else torch.rand(batch, lq, generator=gen) > 0.2,
        }
    dense = None
    dense_kind = draw(st.sampled_from(["", "", "", "bool", "bias"]))
    if dense_kind:
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, kv * group])), lq, lk)
        dense = torch.rand(shape, generator=gen) > 0.3
        if dense_kind == "bias":
            hidden = draw(st.sampled_from([-math.inf, torch.finfo(torch.float32).min, -1e30]))
            dense = torch.randn(shape, generator=gen).masked_fill(~dense, hidden)
    mask = Mask(causal=causal, window=window, q_start=q_start, k_start=k_start, dense=dense, **pads)
    q = torch.randn(batch, kv * group, lq, d, generator=gen, dtype=torch.float64)
    k = torch.randn(batch, kv, lk, d, generator=gen, dtype=torch.float64)
    v = torch.randn(batch, kv, lk, d_v, generator=gen, dtype=torch.float64)
    kwargs: dict[str, Any] = {"mask": mask, "scale": draw(st.sampled_from([0.2, 0.7]))}
    if draw(st.integers(0, 2)) == 0:
        kwargs["softcap"] = 1.5
    if draw(st.integers(0, 2)) == 0:
        kwargs["sinks"] = torch.randn(kv * group, generator=gen, dtype=torch.float64).to(dtype) * 3
    m = draw(st.integers(0, 3))
    listed = {
        "some": torch.randint(-1, lk, (batch, lq, m), generator=gen),
        "one": torch.randint(-1, lk, (batch, 1, 1), generator=gen),
    }
    band = draw(st.sampled_from([(0, 0), (1, 3), (-4, 6), (5, 100)]))
    chosen = torch.rand(batch, lq, generator=gen) > 0.5
    request = Request(
        names=PLAIN_ROW
        if draw(st.booleans())
        else frozenset(draw(st.sets(st.sampled_from(sorted(PLAIN_ROW))))),
        labels=torch.randint(-1, 4, (batch, lk), generator=gen),
        n_groups=4,
        pairs=listed,
        received={
            "all": Received(),
            "set": Received(chosen),
            "band": Received(band=band),
            "both": Received(chosen, band),
            "sum": Received(chosen, reduce="sum"),
            "largest": Received(band=band, reduce="max"),
            "peak": Received(reduce="max"),
            "few": Received(
                keys=torch.randint(-1, lk, (draw(st.sampled_from([1, batch])), 1, 3), generator=gen)
            ),
        },
        cap=draw(st.sampled_from([1, 3, 10])),
        topk=(topk := draw(st.integers(0, 4))),
        topk_rows=torch.randint(0, lq, (3,), generator=gen)
        if topk and draw(st.booleans())
        else None,
    )
    what = draw(st.sampled_from(["all", "all", "cheap", "none"]))
    if what != "none":
        kwargs["request"] = request if what == "all" else Request(pairs=listed)
    return (q.to(dtype), k.to(dtype), v.to(dtype)), kwargs


def loops(
    q: Any, k: Any, v: Any, mask: Mask, scale: float, softcap: Any = None, sinks: Any = None
) -> Any:
    """Attention by explicit loops, independent of the package: A, visible, out, lse as numpy
    float64."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    batch, heads, lq, _ = q.shape
    group, lk = heads // k.shape[1], k.shape[2]
    a = np.zeros((batch, heads, lq, lk))
    visible = np.zeros((batch, heads, lq, lk), dtype=bool)
    lse = np.full((batch, heads, lq), -np.inf)
    for b, h, i in np.ndindex(batch, heads, lq):
        logits = {}
        for j in range(lk):
            x, y = mask.q_start + i, mask.k_start + j
            seen = (y <= x or not mask.causal) and (mask.window is None or abs(x - y) < mask.window)
            seen = seen and (mask.keys is None or bool(mask.keys[b, j]))
            bias = 0.0
            if mask.dense is not None:
                dense = mask.dense[b % mask.dense.shape[0], h % mask.dense.shape[1], i, j].item()
                if mask.dense.dtype == torch.bool:
                    seen = seen and dense
                else:
                    seen, bias = seen and dense > -1e29, dense
            if seen:
                s = scale * float(q[b, h, i] @ k[b, h // group, j])
                logits[j] = (s if softcap is None else softcap * math.tanh(s / softcap)) + bias
        if logits:
            terms = list(logits.values()) + ([] if sinks is None else [float(sinks[h])])
            top = max(terms)
            lse[b, h, i] = top + math.log(sum(math.exp(s - top) for s in terms))
            for j, s in logits.items():
                a[b, h, i, j], visible[b, h, i, j] = math.exp(s - lse[b, h, i]), True
    return a, visible, np.einsum("bhqk,bhkd->bhqd", a, np.repeat(v, group, 1)), lse


def loop_statistics(
    a: np.ndarray, visible: np.ndarray, mask: Mask, request: Request
) -> dict[str, np.ndarray]:
    """Every statistic of A, written as loops over single weights."""
    batch, heads, lq, lk = a.shape
    row = (batch, heads, lq)
    stats = {n: np.zeros(row) for n in ("entropy", "max", "distance", "capped_distance")}
    stats["argmax"] = np.full(row, -1)
    stats["group_mass"] = np.zeros((*row, request.n_groups))
    stats |= {f"pair_mass:{n}": np.zeros(row) for n in request.pairs}
    for n in request.received:
        stats[f"received:{n}"] = np.zeros((batch, heads, lk))
        stats[f"received_count:{n}"] = np.zeros((batch, heads, lk))
    for b, h, i in np.ndindex(*row):
        if mask.queries is not None and not mask.queries[b, i]:
            continue
        for n, index in request.pairs.items():
            for j in index[b, i if index.shape[1] > 1 else 0].tolist():
                stats[f"pair_mass:{n}"][b, h, i] += a[b, h, i, j] if j >= 0 else 0
        best = -1.0
        for j in range(lk):
            if not visible[b, h, i, j]:
                continue
            weight, delta = a[b, h, i, j], mask.q_start + i - mask.k_start - j
            stats["entropy"][b, h, i] -= weight * math.log(weight)
            if weight > best:
                best = stats["max"][b, h, i] = weight
                stats["argmax"][b, h, i] = j
            stats["distance"][b, h, i] += weight * abs(delta)
            stats["capped_distance"][b, h, i] += weight * min(abs(delta), request.cap)
            label = -1 if request.labels is None else int(request.labels[b, j])
            if label >= 0:
                stats["group_mass"][b, h, i, label] += weight
            for n, question in request.received.items():
                if question.queries is not None and not question.queries[b, i]:
                    continue
                if question.band is None or question.band[0] <= delta <= question.band[1]:
                    column = stats[f"received:{n}"][b, h]
                    column[j] = (
                        max(column[j], weight) if question.reduce == "max" else column[j] + weight
                    )
                    stats[f"received_count:{n}"][b, h, j] += 1
    for n, question in request.received.items():
        if question.reduce == "mean":
            stats[f"received:{n}"] /= np.maximum(stats[f"received_count:{n}"], 1)
        if question.keys is not None:
            columns = np.broadcast_to(
                question.keys.numpy(), (batch, heads, question.keys.shape[-1])
            )
            stats[f"received:{n}"] = np.take_along_axis(
                stats[f"received:{n}"], columns.clip(0), -1
            ) * (columns >= 0)
    return stats


def assert_same(
    got: Result, want: Result, a: torch.Tensor, tolerance: float, request: Request | None = None
) -> None:
    """Equal up to rounding; indices may differ only where the weights they point at are equal."""
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(got.out.double(), want.out.double(), **close)
    torch.testing.assert_close(got.lse.double(), want.lse.double(), **close)
    assert got.stats.keys() == want.stats.keys()
    for name, value in want.stats.items():
        other = got.stats[name]
        assert other.shape == value.shape, name
        if name in ("argmax", "topk_index"):
            index, other_index = (
                x if name == "topk_index" else x[..., None] for x in (value, other)
            )
            assert torch.equal(index < 0, other_index < 0), name
            rows = None if request is None or name == "argmax" else request.topk_rows
            pointed = a if rows is None else a[:, :, rows]
            value, other = (pointed.gather(-1, x.clamp_min(0)) for x in (index, other_index))
        scale = (
            20 if "distance" in name else 1
        )  # distances are in tokens, not in units of probability
        torch.testing.assert_close(
            other.double(),
            value.double(),
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@examples(120)
@given(st.data())
def test_reference_is_the_definition(data: Any) -> None:
    (q, k, v), kwargs = make_case(data.draw, torch.float64, largest=6)
    request = kwargs.get("request", Request())
    got = attention(q, k, v, backend="reference", **kwargs)
    kwargs.pop("request", None)
    a, visible, out, lse = loops(q, k, v, **kwargs)
    np.testing.assert_allclose(weights(q, k, **kwargs).numpy(), a, atol=1e-12)
    np.testing.assert_allclose(got.out.numpy(), out, atol=1e-12)
    np.testing.assert_allclose(got.lse.numpy(), lse, atol=1e-12)
    want = loop_statistics(a, visible, kwargs["mask"], request)
    for name, value in got.stats.items():
        if name.startswith("topk"):
            continue
        expected = want[name]
        if name.startswith("received_count") and value.shape[1] == 1:
            expected = expected[:, :1]
        np.testing.assert_allclose(value.numpy(), expected, atol=1e-10, err_msg=name)
    if request.topk and "topk_prob" in got.stats:
        real = (
            np.ones(q.shape[::2])
            if kwargs["mask"].queries is None
            else kwargs["mask"].queries.numpy()
        )
        order = -np.sort(-a * real[:, None, :, None], -1)[..., : request.topk]
        order = order if request.topk_rows is None else order[:, :, request.topk_rows]
        np.testing.assert_allclose(
            got.stats["topk_prob"].numpy()[..., : order.shape[-1]], order, atol=1e-12
        )


@pytest.mark.slow
@examples(400)
@given(st.data())
def test_streaming_equals_reference_float64(data: Any) -> None:
    (q, k, v), kwargs = make_case(data.draw, torch.float64)
    tiny = data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        # several blocks of batch entries and heads, several chunks of rows, several argmax blocks
        if tiny:
            patch.setattr(chunked, "_BUDGET", data.draw(st.sampled_from([50, 400, 2000])))
            patch.setattr(chunked, "_MIN_ROWS", 3)
            patch.setattr(chunked, "_MAX_ROWS", 7)
            patch.setattr(chunked, "_ARGMAX_BLOCK", 4)
        got = attention(q, k, v, **kwargs)
    want = attention(q, k, v, backend="reference", **kwargs)
    a = weights(q, k, **{n: x for n, x in kwargs.items() if n != "request"})
    assert_same(got, want, a, 1e-9, kwargs.get("request"))


@examples(120)
@given(st.data())
def test_statistics_without_the_output(data: Any) -> None:
    (q, k, v), kwargs = make_case(data.draw, torch.float64)
    request = kwargs.get("request", Request())
    if data.draw(st.booleans()):
        request = replace(request, names=frozenset())  # what ACT asks
    kwargs["request"] = replace(request, out=False)
    got, want = (attention(q, k, v, backend=name, **kwargs) for name in ("streaming", "reference"))
    assert got.out.shape[-1] == 0 or not request.received
    if got.out.shape[-1] == 0:
        got = replace(got, out=want.out)
    a = weights(q, k, **{n: x for n, x in kwargs.items() if n != "request"})
    assert_same(got, want, a, 1e-9, request)


@examples(120)
@given(st.data())
def test_streaming_equals_reference_float32(data: Any) -> None:
    (q, k, v), kwargs = make_case(data.draw, torch.float32, largest=200)
    got = attention(q, k, v, **kwargs)
    assert got.lse.dtype == torch.float32
    if "sinks" in kwargs:
        kwargs["sinks"] = kwargs["sinks"].double()
    want = attention(q.double(), k.double(), v.double(), backend="reference", **kwargs)
    a = weights(q.double(), k.double(), **{n: x for n, x in kwargs.items() if n != "request"})
    assert_same(got, want, a, 1e-5, kwargs.get("request"))


@examples(20)
@given(st.data(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_inputs(data: Any, dtype: torch.dtype) -> None:
    (q, k, v), kwargs = make_case(data.draw, dtype)
    got = attention(q, k, v, **kwargs)
    want = attention(q, k, v, backend="reference", **kwargs)
    assert got.out.dtype == dtype
    assert got.lse.dtype == want.lse.dtype == torch.float32
    torch.testing.assert_close(got.out, want.out, atol=0.02, rtol=0.02)
    got.out = want.out
    a = weights(q, k, **{n: x for n, x in kwargs.items() if n != "request"})
    assert_same(got, want, a, 5e-4, kwargs.get("request"))


@examples(25)
@given(st.data())
def test_gradients_equal_reference(data: Any) -> None:
    tensors, kwargs = make_case(data.draw, torch.float64, largest=20)
    if "sinks" in kwargs:
        kwargs["sinks"].requires_grad_()
    leaves = [x.requires_grad_() for x in tensors] + (
        [kwargs["sinks"]] if "sinks" in kwargs else []
    )
    results = [attention(*tensors, **kwargs), attention(*tensors, backend="reference", **kwargs)]
    target = torch.randn_like(results[1].out)
    got, want = (
        torch.autograd.grad((r.out * target).sum(), leaves, allow_unused=True) for r in results
    )
    assert not any(x.requires_grad for x in results[0].stats.values())
    for leaf, x, y in zip(leaves, got, want, strict=True):
        # None: nothing flows (no row sees a key), which is a zero gradient
        x, y = (torch.zeros_like(leaf) if g is None else g for g in (x, y))
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("window", [None, 40])
def test_gradients_across_chunks(window: int | None) -> None:
    q, k, v = (torch.randn(1, 2, 300, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    kwargs = {
        "mask": Mask(window=window),
        "softcap": 2.0,
        "sinks": torch.randn(2, dtype=torch.float64),
    }
    results = [attention(q, k, v, **kwargs), attention(q, k, v, backend="reference", **kwargs)]
    got, want = (
        torch.autograd.grad(r.out.square().sum() + r.lse.sum(), (q, k, v)) for r in results
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [6, 12])  # few rows are a decode step to the kernels
@pytest.mark.parametrize("backend", ["reference", "streaming", "triton"])
@pytest.mark.parametrize("how", ["keys", "dense", "bias", "early", "window"])
def test_rows_that_see_nothing(backend: str, how: str, rows: int) -> None:
    if backend == "triton" and how in ("dense", "bias"):
        backend = "streaming"  # where such a call goes
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(2, 2, rows, 4, device=device) for _ in range(3))
    none = torch.zeros(2, rows, dtype=torch.bool, device=device)
    mask = {
        "keys": Mask(keys=none),
        "dense": Mask(dense=none[:, None, None].expand(2, 1, rows, rows)),
        "bias": Mask(dense=torch.full((1, 1, rows, rows), torch.finfo(torch.float32).min)),
        "early": Mask(k_start=rows + 3),
        "window": Mask(q_start=20, window=4),
    }[how]
    request = Request(
        names=PLAIN_ROW,
        labels=none.long(),
        n_groups=1,
        pairs={"p": none.long()[..., None]},
        topk=2,
        received={"r": Received(), "b": Received(band=(0, 3))},
    )
    for asked in (request, Request(pairs=request.pairs), None):
        for sinks in (None, torch.randn(2, device=device)):
            got = attention(q, k, v, mask=mask, sinks=sinks, request=asked, backend=backend)
            assert torch.equal(got.out, torch.zeros_like(got.out))
            assert torch.equal(got.lse, torch.full_like(got.lse, -math.inf))
            for name, value in got.stats.items():
                expected = -1 if name in ("argmax", "topk_index") else 0
                assert torch.equal(value, torch.full_like(value, expected)), name


class NoSquare(TorchDispatchMode):
    """Fails on any tensor of at least `limit` elements."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                assert x.numel() < self.limit, f"{func} made {tuple(x.shape)}"
        return out


@pytest.mark.parametrize("what", ["full", "cheap", "none", "padded", "grad", "softcap", "window"])
def test_no_square_matrix(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, heads = 2048, 2
    q, k, v = (torch.randn(1, heads, size, 16, requires_grad=what == "grad") for _ in range(3))
    keys = torch.arange(size)[None] >= 5
    full = Request(
        names=PLAIN_ROW, labels=torch.zeros(1, size, dtype=torch.long), n_groups=16, cap=64, topk=4,
        pairs={"previous": torch.arange(-1, size - 1)[None, :, None]},
        received={"all": Received(), "band": Received(band=(1, 32))},
    )  # fmt: skip
    request = {"cheap": Request(pairs=full.pairs), "none": None, "grad": None}.get(what, full)
    mask = Mask(keys=keys if what == "padded" else None, window=200 if what == "window" else None)
    # One head's matrix has size² elements; all scratch must stay well below it.
    monkeypatch.setattr(chunked, "_BUDGET", size * size // 8)
    with NoSquare(size * size // 4):
        got = attention(
            q,
            k,
            v,
            mask=mask,
            request=request,
            softcap=5.0 if what in ("softcap", "grad") else None,
        )
        if what == "grad":
            got.out.sum().backward()


def test_equal_logits_give_the_lowest_column() -> None:
    q, k = torch.ones(1, 1, 300, 4), torch.ones(1, 1, 300, 4)
    for backend in ("reference", "streaming", *(() if torch.cuda.is_available() else ("triton",))):
        got = attention(q, k, k, request=Request(names=frozenset({"argmax"})), backend=backend)
        assert not got.stats["argmax"].any()


def test_entropy_survives_large_logits() -> None:
    """lse − E[s] would lose all digits here; the centred form does not."""
    q, k, v = torch.randn(1, 2, 400, 8), torch.randn(1, 2, 400, 8), torch.randn(1, 2, 400, 8)
    k = k + 1000 * torch.nn.functional.normalize(torch.ones(8), dim=0)
    kwargs: dict[str, Any] = {"scale": 1.0, "request": Request(names=frozenset({"entropy", "max"}))}
    got = attention(q, k, v, **kwargs)
    want = attention(q.double(), k.double(), v.double(), backend="reference", **kwargs)
    torch.testing.assert_close(
        got.stats["entropy"].double(), want.stats["entropy"], atol=2e-3, rtol=2e-3
    )


def test_sink_far_above_the_logits() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    got = attention(
        q,
        k,
        v,
        sinks=torch.tensor([500.0, -500.0]),
        request=Request(names=frozenset({"entropy", "max"})),
    )
    assert got.out[:, 0].abs().max() == 0
    assert torch.isfinite(got.lse).all()
    assert torch.equal(got.stats["entropy"][:, 0], torch.zeros(1, 9))
    torch.testing.assert_close(got.lse[:, 1], attention(q, k, v).lse[:, 1])


def test_strided_and_shared_inputs() -> None:
    base = torch.randn(2, 33, 4, 8)
    q = base.transpose(1, 2)
    k = torch.randn(2, 2, 8, 33).transpose(2, 3)
    v = torch.randn(1, 1, 33, 8).expand(2, 2, 33, 8)
    request = Request(names=PLAIN_ROW - {"group_mass"}, received={"r": Received()})
    for asked in (None, request):
        got, want = (
            attention(q, k, v, request=asked, backend=b) for b in ("streaming", "reference")
        )
        assert_same(got, want, weights(q, k, mask=Mask(), scale=8**-0.5), 1e-5)


def test_scratch_reuse_does_not_leak_into_results() -> None:
    q, k, v = (torch.randn(1, 2, 50, 8) for _ in range(3))
    request = Request(names=frozenset({"entropy"}), received={"r": Received()})
    first = attention(q, k, v, request=request)
    kept = first.out.clone(), first.stats["entropy"].clone()
    attention(q * 2, k, v * 3, request=request)
    assert torch.equal(first.out, kept[0])
    assert torch.equal(first.stats["entropy"], kept[1])


def test_inference_mode_leaves_scratch_usable() -> None:
    q, k, v = (torch.randn(1, 2, 600, 8) for _ in range(3))
    request = Request(names=frozenset({"entropy"}))
    chunked._Buffers._kept.__dict__.clear()
    with torch.inference_mode():
        inside = attention(q, k, v, request=request)
    outside = attention(q, k, v, request=request)
    assert torch.equal(inside.stats["entropy"], outside.stats["entropy"])


def test_explain_and_errors() -> None:
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    assert "vendor SDPA (" in explain(q, k, v)
    assert "exp(q·k − lse)" in explain(
        q, k, v, request=Request(pairs={"a": torch.zeros(1, 6, 1, dtype=torch.long)})
    )
    assert "chunked, because of the dense mask" in explain(
        q, k, v, mask=Mask(dense=torch.ones(1, 1, 6, 6).bool())
    )
    assert "two vendor" in explain(q[:, :, :3], k, v, mask=Mask(q_start=3))
    assert "entropy" in explain(q, k, v, request=Request(names=frozenset({"entropy"})))
    assert "reference" in explain(q, k, v, backend="reference")
    with pytest.raises(BackendError, match="There is no backend 'cuda'"):
        attention(q, k, v, backend="cuda")
    with pytest.raises(ValueError, match=r"mask\.keys"):
        attention(q, k, v, mask=Mask(keys=torch.ones(1, 5).bool()))
    with pytest.raises(ValueError, match="sinks"):
        attention(q, k, v, sinks=torch.ones(3))
    with pytest.raises(ValueError, match="Unknown statistics"):
        Request(names=frozenset({"enthropy"}))
    with pytest.raises(ValueError, match="window"):
        attention(q, k, v, mask=Mask(window=0))


def test_no_queries_and_key_counts() -> None:
    q, k = torch.randn(1, 2, 0, 4), torch.randn(1, 2, 5, 4)
    got = attention(q, k, k, request=Request(names=frozenset({"max"}), received={"r": Received()}))
    assert got.out.shape == (1, 2, 0, 4)
    assert not got.stats["received:r"].any()
    vis = masking.Visibility(Mask(), 1, 2, 5, 5, torch.device("cpu"))
    assert vis.key_counts(Received()).tolist() == [[[5, 4, 3, 2, 1]]]
    assert vis.row_counts().tolist() == [[1, 2, 3, 4, 5]]
