"""interp_kernels.fused.plans: a planned decode step launches what the long way launches, for every
change of what it hangs on; plans keep no tensors alive, and are few."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from interp_kernels import Mask, Received, Request, Rule, Steer, attention, dispatch
from interp_kernels.fused import capable, decode_launch, decode_statistics, plans
from interp_kernels.fused.primitives import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="launches are stubbed on the CPU")


@pytest.fixture(autouse=True)
def no_plans() -> Iterator[None]:
    plans.forget()
    yield
    plans.forget()


class Recorder:
    """Stands in for a kernel, and keeps what it was launched with; tensors that were passed to
    the call by where they are, others by what they are."""

    def __init__(self, log: list[Any]) -> None:
        self.log, self.given = log, set[int]()
        self.broken: Exception | None = None

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            if self.broken:
                raise self.broken
            self.log.append((grid, [self._of(x) for x in args], sorted(constants.items())))

        return launch

    def _of(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return type(x), x
        where = x.data_ptr() if x.data_ptr() in self.given else None
        return x.dtype, tuple(x.shape), x.stride(), where


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder([])
    monkeypatch.setattr(decode_launch, "split_kernel", recorder)
    monkeypatch.setattr(decode_launch, "combine_kernel", recorder)
    monkeypatch.setattr(decode_statistics, "decode_statistics_kernel", recorder)
    return recorder


#: What a call is made of: name → its possible values, the usual one first. Some do not fit.
CHOICES: dict[str, list[Any]] = {
    "batch": [1, 2],
    "kv": [1, 2],
    "group": [2, 1],
    "lq": [1, 2, 9],
    "lk": [24, 25, 40, 2],
    "d": [16, 24],
    "d_v": [16, 8],
    "dtype": [torch.float32, torch.float16, torch.bfloat16, torch.float64],
    "v_dtype": [None, torch.float16],
    "layout": ["whole", "turned", "cut"],
    "ahead": [0, 3, -2, True],
    "causal": [True, False, 1],
    "window": [None, 5, 7, 0, 5.0, True],
    "keep_first": [0, 2],
    "keys": [None, torch.bool, torch.uint8, torch.float32, "short"],
    "queries": [None, torch.bool],
    "scale": [None, 0.3, 0.2, 1, -0.3, float("nan"), "a"],
    "softcap": [None, 2.0, 3.0, 2, -1.0],
    "sinks": [None, torch.float32, torch.float16, "short"],
    "names": [
        frozenset(), frozenset({"entropy"}), frozenset({"max", "argmax"}), frozenset({"distance"}),
    ],
    "topk": [0, 3, 20, True, 3.0, -1],
    "rows": [None, [0], [5]],
    "pairs": [None, 3, 400],
    "received": [None, Received(), Received(band=(0, 3)), Received(reduce="sum"), 7],
    "temper": [None, (1, 1, 1), (1, "heads", "lq"), (3, 1, 1)],
    "bias": [None, torch.float32, torch.float16, "heads", "short"],
    "gain": [None, (1, "heads", 1), (1, 1, 1), (1, 1, 5)],
    "blend": [None, torch.float32],
    "rule": [
        None, "receive", "keep", "renormalise", "at least", "tests", "rows", "half", "wide", "two",
    ],
    "where": [
        ((0, 2, 1),), ((0, 2, 0),), ((1, 2, 1), (0, 1, 1)), ((0, 30, 1),), ((0.0, 2.0, 1.0),),
        ((0, 2, 5),), ((0, 1, 1),) * 5, torch.int64, torch.int32, torch.float32, "heads", "far",
    ],
    "several": ["one", "list", "pair", "none"],
    "grad": [None, "on", "q", "gain"],
}  # fmt: skip


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.arange(torch.Size(shape).numel()).reshape(shape) % 7
    return made.to(dtype) if dtype.is_floating_point else (made % 2).to(dtype)


def steer_of(x: dict[str, Any], heads: int) -> Any:
    batch, lq, lk = x["batch"], x["lq"], x["lk"]

    def sized(shape: Any) -> Any:
        sizes = {"heads": heads, "lq": lq}
        return None if shape is None else tensor(*(sizes.get(n, n) for n in shape)) + 1

    bias = {
        "heads": lambda: tensor(1, heads, lk),
        "short": lambda: tensor(1, 1, lk - 1),
        None: lambda: None,
    }.get(x["bias"], lambda: tensor(1, 1, lk, dtype=x["bias"]))()
    rule: Any = None
    where: dict[str, Any] = {}
    if x["rule"] is not None:
        groups = 9 if x["rule"] == "wide" else 2
        dtype = torch.float16 if x["rule"] == "half" else torch.float32
        more = {
            "receive": {"receive": torch.ones(1, groups)},
            "renormalise": {"renormalise": True},
            "at least": {"renormalise": True, "receive": torch.ones(1, groups)},
            "tests": {"tests": torch.ones(2, groups), "bounds": torch.zeros(2)},
            "rows": {"rows": torch.ones(batch, lq, dtype=torch.bool)},
        }.get(x["rule"], {})
        rule = Rule(torch.ones(heads, groups, dtype=dtype), **more)
        rule = (rule, rule) if x["rule"] == "two" else rule
        place = x["where"]
        if isinstance(place, tuple):
            where = {"spans": place}
        elif place == "heads":
            where = {"labels": torch.zeros(1, heads, lk, dtype=torch.int64)}
        elif place == "far":
            where = {"labels": torch.full((1, 1, lk), 7)}
        else:
            where = {"labels": torch.zeros(1, 1, lk, dtype=place)}
    blend = None if x["blend"] is None else torch.full((1,), 0.5)
    gain = sized(x["gain"])
    if x["grad"] == "gain" and gain is not None:
        gain.requires_grad_()
    one = Steer(sized(x["temper"]), bias, rule=rule, blend=blend, gain=gain, **where)
    return {"one": one, "list": [one], "pair": [one, Steer(gain=torch.ones(1, 1, 1))]}.get(
        x["several"]
    )


def call_of(x: dict[str, Any]) -> tuple[tuple[Tensor, ...], Any]:
    """(q, k, v) and a function that attends; raises where a `Request` cannot even be made."""
    batch, kv, lq, lk, d, d_v, dtype = (
        x[name] for name in ("batch", "kv", "lq", "lk", "d", "d_v", "dtype")
    )
    heads = kv * x["group"]
    q = tensor(batch, heads, lq, d, dtype=dtype)
    k, v = tensor(batch, kv, lk, d, dtype=dtype), tensor(batch, kv, lk, d_v, dtype=dtype)
    if x["layout"] == "turned":
        q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    elif x["layout"] == "cut":
        k, v = (torch.cat([t, t], 2)[:, :, :lk] for t in (k, v))
    v = v if x["v_dtype"] is None else v.to(x["v_dtype"])
    keys = {None: None, "short": tensor(batch, lk - 1, dtype=torch.bool)}.get(
        x["keys"], None if isinstance(x["keys"], str | None) else tensor(batch, lk, dtype=x["keys"])
    )
    sinks = None
    if x["sinks"] is not None:
        sinks = tensor(1) if x["sinks"] == "short" else tensor(heads, dtype=x["sinks"])
    queries = None if x["queries"] is None else torch.ones(batch, lq, dtype=torch.bool)
    start = x["ahead"] if x["ahead"] is True else max(lk - lq + x["ahead"], 0)
    mask = Mask(
        x["causal"], x["window"], start, keys=keys, queries=queries, keep_first=x["keep_first"]
    )
    pairs = {} if x["pairs"] is None else {"p": torch.full((1, 1, 2), min(x["pairs"], 400))}
    received = {} if x["received"] is None else {"r": x["received"]}
    rows = None if x["rows"] is None or not x["topk"] else torch.tensor(x["rows"])
    request = Request(x["names"], pairs=pairs, received=received, topk=x["topk"], topk_rows=rows)
    if x["grad"] == "q":
        q.requires_grad_()
    steer = steer_of(x, heads)

    def run() -> Any:
        with torch.set_grad_enabled(x["grad"] is not None):
            return attention(
                q, k, v, backend="triton", mask=mask, scale=x["scale"], softcap=x["softcap"],
                sinks=sinks, request=request, steer=steer,
            )  # fmt: skip

    return (q, k, v), run


def seen(stubbed: Recorder, tensors: tuple[Tensor, ...], run: Any) -> Any:
    """What a call launches and gives, or how it fails."""
    stubbed.log.clear()
    stubbed.given = {t.data_ptr() for t in tensors}
    try:
        got = run()
    except Exception as error:
        return type(error), str(error), list(stubbed.log)
    stats = {name: (t.dtype, tuple(t.shape)) for name, t in got.stats.items()}
    shapes = [(t.dtype, tuple(t.shape), t.stride()) for t in (got.out, got.lse)]
    return list(stubbed.log), stats, shapes


USUAL = {name: values[0] for name, values in CHOICES.items()}
FITTING = {name: st.sampled_from(values[:3]) for name, values in CHOICES.items()}


@st.composite
def changed(draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two calls of which the second differs in one thing or two; a few unusual things in both."""
    before = dict(USUAL)
    for name in draw(st.sets(st.sampled_from(sorted(CHOICES)), max_size=5)):
        before[name] = draw(FITTING[name])
    after = dict(before)
    for name in draw(st.sets(st.sampled_from(sorted(CHOICES)), min_size=1, max_size=2)):
        after[name] = draw(st.sampled_from(CHOICES[name]))
    return before, after


def same_as_the_long_way(both: Any, stubbed: Recorder) -> None:
    before, after = (call_of(x) for x in both)
    plans.forget()
    want = seen(stubbed, *after)
    again = seen(stubbed, *after)  # by its own plan, where it has one
    plans.forget()
    seen(stubbed, *before)
    assert again == want
    assert seen(stubbed, *after) == want


@examples(60)
@given(both=changed())
def test_no_change_takes_a_stale_plan(both: Any, stubbed: Recorder) -> None:
    same_as_the_long_way(both, stubbed)


@pytest.mark.long
@examples(2000)
@given(both=changed())
def test_no_change_takes_a_stale_plan_at_length(both: Any, stubbed: Recorder) -> None:
    same_as_the_long_way(both, stubbed)


@pytest.mark.parametrize("name", sorted(CHOICES))
@pytest.mark.parametrize("rule", [None, "receive"])
def test_every_change_alone(name: str, rule: str | None, stubbed: Recorder) -> None:
    usual = USUAL | {"rule": rule} | ({"topk": 3} if name == "rows" else {})
    values = CHOICES[name]
    for first, second in [*itertools.pairwise(values), *((x, values[0]) for x in values)]:
        same_as_the_long_way((usual | {name: first}, usual | {name: second}), stubbed)


def validations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    prepare = dispatch.prepare
    monkeypatch.setattr(
        dispatch, "prepare", lambda *args, **given: (made.append(args), prepare(*args, **given))[1]
    )
    return made


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"rule": "receive", "several": "list"},
        {"rule": "half", "where": torch.int64},
        {"gain": (1, "heads", 1), "keys": torch.bool, "softcap": 2.0},
        {"names": frozenset({"entropy"}), "topk": 3, "received": Received()},
        {"topk": 3, "window": 5, "dtype": torch.bfloat16, "grad": "on"},
    ],
)
def test_a_growing_cache_is_validated_once(
    asked: dict[str, Any], stubbed: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = validations(monkeypatch)
    for lk in range(20, 60):
        _, run = call_of(USUAL | asked | {"lk": lk})
        run()
    assert len(made) == 1 and len(plans._PLANS) == 1


def tensors_under(root: Any) -> list[Tensor]:
    """Every tensor that can be reached from an object through containers and instances."""
    found, todo, met = [], [root], set()
    while todo:
        one = todo.pop()
        if id(one) in met or isinstance(one, type) or callable(one):
            continue
        met.add(id(one))
        if isinstance(one, Tensor):
            found.append(one)
            continue
        todo += gc.get_referents(one)
    return found


def test_plans_keep_nothing_alive(stubbed: Recorder) -> None:
    made = []
    for rule in ("receive", "tests", "half", None):
        asked = {"rule": rule, "bias": torch.float32, "keys": torch.bool, "pairs": 3, "topk": 3}
        (q, k, v), run = call_of(USUAL | asked | {"sinks": torch.float32})
        run()
        run()
        made += [weakref.ref(q), weakref.ref(k), weakref.ref(v)]
        del q, k, v, run
    assert len(plans._PLANS) == 4
    assert not tensors_under(plans._PLANS)
    gc.collect()
    assert all(one() is None for one in made)


def test_plans_are_few(stubbed: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST", 4)
    for n in range(1, 9):
        call_of(USUAL | {"group": n})[1]()
        assert len(plans._PLANS) == min(n, 4)
    made = validations(monkeypatch)
    call_of(USUAL | {"group": 8})[1]()
    assert not made
    call_of(USUAL | {"group": 1})[1]()
    assert len(made) == 1


def test_a_kernel_that_no_longer_runs(stubbed: Recorder) -> None:
    """A plan is no way round what is known not to run."""
    from triton.runtime.errors import OutOfResources

    _, run = call_of(USUAL)
    try:
        run()
        stubbed.broken = OutOfResources(300_000, 232_448, "shared memory")
        with pytest.raises(dispatch.BackendError, match="does not run on this device"):
            run()
        stubbed.broken = None
        with pytest.raises(dispatch.BackendError, match="does not run on this device"):
            run()
    finally:
        capable.forget()


def test_batched_and_traced_calls_keep_the_operator(stubbed: Recorder) -> None:
    """Where something stands between a call and its launch, no plan goes past it."""
    from torch._subclasses import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    tensors, run = call_of(USUAL)
    run()
    stubbed.log.clear()
    with FlopCounterMode(display=False):
        run()
    assert plans.Step(*tensors, {}).key is not None
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert plans.Step(*tensors, {}).key is None
    found = []
    torch.func.vmap(lambda q: found.append(plans.Step(q, *tensors[1:], {}).key) or q)(
        tensors[0][None]
    )
    assert found == [None]


@pytest.mark.parametrize("rule", [None, "receive"])
def test_planned_steps_against_float64(rule: str | None) -> None:
    """The kernels themselves, over a cache that grows and is then cut."""
    generator = torch.Generator().manual_seed(0)
    cache = [torch.randn(1, 2, 40, 16, generator=generator) for _ in range(2)]
    q = torch.randn(1, 4, 1, 16, generator=generator)
    receive = torch.tensor([[1.0, 0.0]])
    steer = Steer(spans=((0, 2, 1),), rule=Rule(torch.tensor([[1.0, 0.5]]), receive))
    request = Request(frozenset({"entropy", "max", "argmax"}))
    given: dict[str, Any] = {"request": request, "steer": steer if rule else None}
    for lk in (33, 34, 40, 12):
        k, v = (x[:, :, :lk] for x in cache)
        mask = Mask(q_start=lk - 1, window=30)
        with torch.no_grad():
            got = attention(q, k, v, mask=mask, backend="triton", **given)
            want = attention(
                q.double(), k.double(), v.double(), mask=mask, backend="reference", **given
            )
        torch.testing.assert_close(got.out.double(), want.out, atol=2e-5, rtol=0)
        torch.testing.assert_close(got.lse.double(), want.lse.double(), atol=2e-5, rtol=0)
        for name in ("entropy", "max"):
            near = want.stats[name].double()
            torch.testing.assert_close(got.stats[name].double(), near, atol=2e-5, rtol=0)
        assert torch.equal(got.stats["argmax"], want.stats["argmax"])
    assert len(plans._PLANS) == 1


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("where", ["spans", "many", "labels", "none"])
def test_statistics_of_long_rows(where: str, sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several tiles, some of them hidden, by several heads; and a row that sees nothing."""
    monkeypatch.setattr(decode_statistics, "_TILE", 32)
    generator = torch.Generator().manual_seed(1)
    batch, heads, lq, lk = 2, 2, 2, 100
    q = torch.randn(batch, heads, lq, 16, generator=generator)
    k, v = (torch.randn(batch, 1, lk, 16, generator=generator) for _ in range(2))
    keys = torch.rand(batch, lk, generator=generator) < 0.7
    keys[1] = False
    mask = Mask(q_start=lk - lq, keys=keys)
    keep, receive = torch.rand(heads, 3, generator=generator), torch.tensor([[1.0, 0.0, 0.0]])
    at: dict[str, Any] = {
        "spans": {"spans": ((1, 40, 1), (70, lk, 2))},
        "many": {"spans": tuple((14 * i, 14 * i + 5, 1 + i % 2) for i in range(7))},
        "labels": {"labels": torch.randint(0, 3, (batch, heads, lk), generator=generator)},
    }.get(where, {})
    given: dict[str, Any] = {
        "mask": mask,
        "sinks": torch.randn(heads, generator=generator) if sinks else None,
        "steer": Steer(rule=Rule(keep, receive), **at) if at else None,
    }
    for names in ({"entropy"}, {"max", "argmax"}):
        request = Request(frozenset(names))
        with torch.no_grad():
            got = attention(q, k, v, backend="triton", request=request, **given)
            wide = q.double(), k.double(), v.double()
            want = attention(*wide, backend="reference", request=request, **given)
        assert set(got.stats) == names
        for name in names - {"argmax"}:
            near = want.stats[name].double()
            torch.testing.assert_close(got.stats[name].double(), near, atol=2e-5, rtol=1e-5)
        if "argmax" in names:
            assert torch.equal(got.stats["argmax"], want.stats["argmax"])


def test_a_broken_row_has_broken_statistics() -> None:
    q, k = torch.ones(1, 1, 1, 16), torch.ones(1, 1, 20, 16)
    k[0, 0, 3] = torch.nan
    request = Request(frozenset({"entropy", "max", "argmax"}))
    with torch.no_grad():
        got = attention(q, k, k, mask=Mask(q_start=19), backend="triton", request=request)
    assert got.stats["entropy"].isnan().all() and got.stats["max"].isnan().all()
