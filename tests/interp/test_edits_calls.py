"""Every edit on random attention calls, against its formula on whole matrices in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from edit_definitions import BEFORE, INPUTS, OUTPUT, WEIGHTS, Attention, z_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from interp import edits as E
from interp_hooks.call import AttentionCall, Site
from interp_hooks.edit import Edit
from interp_hooks.engine import Tap, attend
from interp_hooks.errors import EditError
from interp_kernels import Mask

Draw = Any
some = settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


#: the width of random streams
STREAM = 5


def attention_of(call: AttentionCall, pads: list[int]) -> Attention:
    """The call as the definitions read it; `pads` tokens of left padding in each sample."""
    mask, pad = call.mask, torch.tensor(pads)[:, None]
    q, k = torch.arange(call.n_queries) + mask.q_start, torch.arange(call.n_keys) + mask.k_start
    sees = torch.ones(len(q), len(k), dtype=torch.bool)
    if mask.causal:
        sees &= k <= q[:, None]
    if mask.window is not None:
        sees &= (q[:, None] - k).abs() < mask.window
    sees = sees & (k >= pad)[:, None]
    assert call.query is not None and call.key is not None
    return Attention(
        call.site.layer,
        call.query,
        call.key,
        call.value,
        sees[:, None],
        q - pad,
        k - pad,
        q,
        k,
        call.scaling,
        call.softcap,
        call.sinks,
        mask.window is not None,
        last=99,
        hidden=call.hidden,
    )


KINDS = ("prefill", "chunk", "decode")


@st.composite
def calls(
    draw: Draw, kinds: tuple[str, ...] = KINDS, causal: bool = True, sinks: bool = True
) -> tuple[AttentionCall, list[int]]:
    """Prefill, a later chunk, or a decode step; GQA, left padding, sliding windows (also in the
    cache), batch > 1."""
    gen = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    batch, kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(kinds))
    start = {"prefill": 0, "chunk": draw(st.integers(1, 6)), "decode": draw(st.integers(4, 12))}[
        kind
    ]
    queries = 1 if kind == "decode" else draw(st.integers(3, 10))
    window = draw(st.sampled_from([None, None, 3, 7]))
    n = start + queries
    k_start = max(0, start - window + 1) if window and draw(st.booleans()) else 0
    pads = [draw(st.sampled_from([0, 0, min(2, start + 1)])) for _ in range(batch)]
    d = 8

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    real = (torch.arange(n) >= torch.tensor(pads)[:, None]) if any(pads) else None
    mask = Mask(
        causal,
        window,
        start,
        k_start,
        None if real is None else real[:, k_start:],
        None if real is None else real[:, start:],
        starts=None if real is None else torch.tensor(pads),
    )
    site = Site("", draw(st.integers(0, 1)), "self", "", kv * group, kv, d)
    call = AttentionCall(
        site, random(batch, kv * group, queries, d) * 2, random(batch, kv, n - k_start, d),
        random(batch, kv, n - k_start, d), mask, d**-0.5, draw(st.sampled_from([None, 1.5])),
        random(kv * group) if sinks and draw(st.booleans()) else None,
        hidden=random(batch, queries, STREAM),
    )  # fmt: skip
    return call, pads


def keys(draw: Draw, call: AttentionCall) -> Any:
    """A set of keys in any of its forms."""
    n = call.mask.q_start + call.n_queries
    span = tuple(sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))))
    scattered = draw(st.lists(st.integers(0, n), max_size=4))
    tensor = (
        torch.rand(call.batch, n, generator=torch.Generator().manual_seed(len(scattered))) < 0.4
    )
    return draw(st.sampled_from(["initial", span, scattered, tensor]))


def heads(draw: Draw, call: AttentionCall) -> Any:
    """None, or some heads of the call's layer (and one of another)."""
    few = draw(st.lists(st.integers(0, call.site.n_heads - 1), unique=True))
    return draw(
        st.sampled_from([None, [(call.site.layer, h) for h in few] + [(1 - call.site.layer, 0)]])
    )


def values(draw: Draw, call: AttentionCall, low: float, high: float) -> dict[str, Any]:
    """One number for `heads`, or a number a head; name it with ** where the edit takes it."""
    number = st.floats(low, high).map(lambda x: round(x, 3))
    if draw(st.booleans()):
        return dict(value=draw(number), heads=heads(draw, call))
    return dict(
        value={
            (call.site.layer, h): draw(number)
            for h in range(draw(st.integers(0, call.site.n_heads)))
        }
    )


def ranged(draw: Draw) -> Any:
    return draw(st.sampled_from([None, None, (2, 7), (0, 4), (3, None)]))


def scope(draw: Draw) -> Any:
    return draw(st.sampled_from(["all", "all", "prefill", "decode"]))


def valued(
    draw: Draw, call: AttentionCall, kind: Any, low: float, high: float, **more: Any
) -> Edit:
    found = values(draw, call, low, high)
    return kind(**{kind.value_field: found.pop("value")}, **found, scope=scope(draw), **more)


def move_mass(draw: Draw, call: AttentionCall) -> Edit:
    share = draw(st.sampled_from([0.3, 1.0]))
    both = keys(draw, call), keys(draw, call)
    rest = dict(heads=heads(draw, call), scope=scope(draw), queries=ranged(draw))
    try:
        return E.MoveMass(*both, share, **rest)
    except EditError:  # they share tokens
        return E.MoveMass((0, 2), [3, 5], share, **rest)


def make_act(draw: Draw, call: AttentionCall) -> Edit:
    limit = dict(threshold=0.2) if draw(st.booleans()) else dict(alpha=1.3)
    return E.ACT(
        draw(st.sampled_from([0.0, 0.4])),
        **limit,
        heads=heads(draw, call),
        min_rows=draw(st.integers(1, 3)),
    )


def make_var(draw: Draw, call: AttentionCall) -> Edit:
    image, visual = (1, 4), draw(st.sampled_from([[2], (1, 3), [1, 3]]))
    preset = draw(st.sampled_from(["paper", "code"]))
    if draw(st.booleans()):
        slots = torch.arange(call.mask.q_start + call.n_queries)
        image = ((slots > 0) & (slots < 5)).expand(call.batch, -1)
        visual = image & (slots % 2 == 0)
    text = draw(st.sampled_from([None, "initial", {0: "initial", 1: [0, 5]}]))
    numbers = dict(
        rho=draw(st.sampled_from([None, 0.3])), image_mass=draw(st.sampled_from([0.1, 0.3]))
    )
    return E.VAR(
        image, text, visual, preset=preset, **numbers, heads=heads(draw, call), scope=scope(draw)
    )


def gate(draw: Draw, call: AttentionCall) -> Edit:
    kv = call.site.n_kv_heads
    number = draw(st.sampled_from([0.0, 0.3, 1.0]))
    tensor = torch.linspace(0, 1, 2 * kv).view(2, kv)
    alpha = draw(st.sampled_from([number, {(call.site.layer, kv - 1): number}, tensor]))
    return E.Gate(alpha, draw(st.integers(0, 2)), draw(st.integers(1, 3)), scope(draw))


def vhr(draw: Draw, call: AttentionCall) -> Edit:
    alpha = draw(st.sampled_from([0.0, 2.0]))
    if draw(st.booleans()):
        return E.VHR([(call.site.layer, 0)], alpha, scope(draw))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return E.VHR(
        None, alpha, scope(draw), torch.rand(call.batch, 2, call.site.n_heads, generator=gen) < 0.5
    )


def sigmoid(draw: Draw, call: AttentionCall) -> Edit:
    which = draw(st.sampled_from([{}, dict(bias=-1.5), dict(length=9)]))
    return E.SigmoidAttention(**which, scope=scope(draw))


def overwrite_row(draw: Draw, call: AttentionCall) -> Edit:
    last = call.n_queries - 2  # there may be one pad
    query = draw(st.sampled_from([None, last, [last - b % 2 for b in range(call.batch)]]))
    one = st.lists(st.integers(0, last - 1), min_size=1, max_size=3)
    keys = draw(
        one if draw(st.booleans()) else st.lists(one, min_size=call.batch, max_size=call.batch)
    )
    weights = (
        None
        if isinstance(keys[0], list)
        else draw(st.sampled_from([None, [0.5, -0.25, 2.0][: len(keys)]]))
    )
    for_all = [keys] if len(keys) == call.batch and isinstance(keys[0], int) else keys
    return E.OverwriteRow(heads(draw, call), for_all, weights, query)


def routed(draw: Draw, call: AttentionCall) -> Edit:
    gen = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weights = torch.randn(2, call.site.n_heads + 2, STREAM, generator=gen, dtype=torch.float64)
    shared = draw(st.sampled_from([0.0, 0.5])) if call.site.n_heads > 1 else 0.0
    keep = draw(st.sampled_from([1, 2, 0.25, 1.0]))
    return E.RoutedHeads(weights, keep, shared, draw(st.booleans()), scope(draw))


MAKE: dict[str, Callable[[Draw, AttentionCall], Edit]] = {
    "scale_heads": lambda d, c: E.ScaleHeads(
        {(c.site.layer, 0): -0.5, (1 - c.site.layer, 0): 3}, scope(d), ranged(d)
    ),
    "shift_heads": lambda d, c: E.ShiftHeads(
        {(c.site.layer, 0): [0.5] * c.value.shape[3], (1 - c.site.layer, 0): [1.0]},
        d(st.sampled_from([-1.5, 2.0])),
        scope(d),
        ranged(d),
    ),
    "rotate_heads": lambda d, c: E.RotateHeads(
        {(c.site.layer, 0): [0.5, *[0.25] * (c.value.shape[3] - 1)], (1 - c.site.layer, 0): [1.0]},
        d(st.sampled_from([-1.0, 0.5, 1.0])),
        scope(d),
        ranged(d),
    ),
    "ablate_zero": lambda d, c: E.Ablate(heads(d, c), scope=scope(d), queries=ranged(d)),
    "ablate_uniform": lambda d, c: E.Ablate(
        heads(d, c), "uniform", scope=scope(d), queries=None if c.sinks is not None else ranged(d)
    ),
    "scale_tokens": lambda d, c: E.ScaleTokens(
        keys(d, c), d(st.sampled_from([0.0, 0.2, 5.0])), heads(d, c), scope(d), ranged(d)
    ),
    "seka": lambda d, c: E.SEKA(
        keys(d, c),
        [(c.site.layer, c.site.n_kv_heads - 1), (1 - c.site.layer, 0)],
        torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)),
        d(st.sampled_from([-1.0, 0.5])),
        scope(d),
    ),
    "spotlight": lambda d, c: E.SpotLight(
        keys(d, c), d(st.sampled_from([0.05, 0.4, 1.0])), heads(d, c), scope(d), ranged(d)
    ),
    "zero_tuning": lambda d, c: valued(d, c, E.ZeroTuning, 0.1, 4, queries=ranged(d)),
    "move_mass": move_mass,
    "act": make_act,
    "var": make_var,
    "vhr": vhr,
    "temperature": lambda d, c: valued(
        d, c, E.Temperature, 0.3, 3, rule=d(st.sampled_from([None, "ssa"])), beta=0.5
    ),
    "soft_pag": lambda d, c: valued(d, c, E.SoftPAG, 0, 1),
    "paint": lambda d, c: valued(d, c, E.PAINT, -0.5, 2, keys=keys(d, c)),
    "overwrite_row": overwrite_row,
    "streaming": lambda d, c: E.Streaming(
        d(st.integers(0, 2)), d(st.integers(1, 3)), scope=scope(d)
    ),
    "sharded": lambda d, c: E.Sharded(
        d(st.integers(2, 3)), d(st.integers(1, 4)), d(st.integers(1, 3)), heads(d, c), scope(d)
    ),
    "hierarchical_topk": lambda d, c: E.HierarchicalTopk(
        d(st.integers(1, 4)),
        d(st.integers(1, 3)),
        d(st.integers(1, 2)),
        d(st.integers(0, 2)),
        d(st.integers(1, 2)),
        heads(d, c),
        scope(d),
    ),
    "gate": gate,
    "sigmoid_attention": sigmoid,
    "softplus_reweight": lambda d, c: E.SoftplusReweight(
        d(st.sampled_from([None, 3, 15])), heads(d, c), scope(d)
    ),
    "routed_heads": routed,
    "head_gate": lambda d, c: E.HeadGate(
        d(st.sampled_from([0, 1, 0.25])), d(st.sampled_from([0.0, 0.5])), scope=scope(d)
    ),
}
NO_SINKS = ("sigmoid_attention", "softplus_reweight")


def compare(call: AttentionCall, pads: list[int], edits: list[Edit]) -> None:
    found = attend(call, Tap([], list(edits)))
    x = attention_of(call, pads)
    wanted, real = z_of(x, edits), x.q_token >= 0
    torch.testing.assert_close(found[real], wanted[real], atol=2e-6, rtol=2e-6)


def test_every_edit_is_defined_and_tried() -> None:
    kinds = {*INPUTS, *BEFORE, *WEIGHTS, *OUTPUT}
    assert {k.name for k in kinds} == set(E.registry.names())
    assert {name.split("_zero")[0].split("_uniform")[0] for name in MAKE} == set(E.registry.names())


@pytest.mark.parametrize("name", MAKE)
def test_one_edit_of_a_random_call(name: str) -> None:
    @some
    @given(data=st.data())
    def run(data: Any) -> None:
        kinds = ("prefill",) if name in ("act", "overwrite_row") else KINDS
        call, pads = data.draw(calls(kinds=kinds, sinks=name not in NO_SINKS))
        compare(call, pads, [MAKE[name](data.draw, call)])

    run()


@pytest.mark.parametrize(
    "name",
    [
        "scale_tokens",
        "seka",
        "spotlight",
        "zero_tuning",
        "move_mass",
        "temperature",
        "soft_pag",
        "act",
    ],
)
def test_without_causality(name: str) -> None:
    @settings(some, max_examples=8)
    @given(data=st.data())
    def run(data: Any) -> None:
        call, pads = data.draw(calls(("prefill",), causal=False))
        compare(call, pads, [MAKE[name](data.draw, call)])

    run()


def test_gains_multiply_also_beside_sink_logits() -> None:
    """What an edit leaves to the sink logit is what the next one finds there."""
    gen = torch.Generator().manual_seed(0)
    q, k, v, sinks = (
        torch.randn(s, generator=gen, dtype=torch.float64) for s in ((1, 2, 7, 8),) * 3 + ((2,),)
    )
    call = AttentionCall(Site("", 0, "self", "", 2, 2, 8), q, k, v, Mask(), 8**-0.5, sinks=sinks)
    twice = [E.ZeroTuning(2.0), E.ZeroTuning(3.0)]
    compare(call, [0], twice)
    torch.testing.assert_close(
        attend(call, Tap([], list(twice))), attend(call, Tap([], [E.ZeroTuning(6.0)]))
    )


REPLACING = ("gate", "softplus_reweight", "sigmoid_attention")
JOINED = [
    n for n in MAKE if n not in (*REPLACING, "act", "paint", "ablate_uniform", "overwrite_row")
]


@some
@given(data=st.data())
def test_several_edits_are_their_definitions_one_after_the_other(data: Any) -> None:
    call, pads = data.draw(calls())
    names = data.draw(st.lists(st.sampled_from(JOINED), min_size=2, max_size=4))
    if "streaming" in names:  # two such masks need one to hold the other
        names = [
            n for i, n in enumerate(names) if n != "streaming" or i == names.index("streaming")
        ]
    compare(call, pads, [MAKE[n](data.draw, call) for n in names])


@pytest.mark.parametrize("last", ["gate", "softplus_reweight", "paint"])
def test_edits_that_look_at_the_model_itself_go_with_rules(last: str) -> None:
    """The gate's streaming half, and PAINT's |s|, are the model's own."""

    @settings(some, max_examples=10)
    @given(data=st.data())
    def run(data: Any) -> None:
        call, pads = data.draw(calls(sinks=False))
        rules = st.sampled_from(["zero_tuning", "move_mass", "scale_heads"])
        names = data.draw(st.lists(rules, min_size=1, max_size=2))
        compare(call, pads, [MAKE[n](data.draw, call) for n in (*names, last)])

    run()


def test_act_after_another_edit_sees_what_that_left() -> None:
    for seed in range(6):
        gen = torch.Generator().manual_seed(seed)
        q, k, v = (
            torch.randn(2, h, 9, 8, generator=gen, dtype=torch.float64) * s
            for h, s in ((4, 2), (2, 1), (2, 1))
        )
        call = AttentionCall(Site("", 0, "self", "", 4, 2, 8), q, k, v, Mask(), 8**-0.5)
        for edits in (
            [E.ZeroTuning(5.0), E.ACT(0.2, 1.5)],
            [E.ACT(0.2, 1.5), E.MoveMass([1, 2], "initial", 0.5)],
        ):
            compare(call, [0, 0], edits)


# --- TransformerLens: weights instead of queries and keys
# ---------------------------------------------------------


def pattern_call(call: AttentionCall, pads: list[int]) -> AttentionCall:
    x = attention_of(call, pads)
    return replace(
        call, query=None, key=None, scaling=1.0, softcap=None, sinks=None, pattern=x.softmax()
    )


@some
@given(data=st.data())
def test_streaming_of_a_pattern(data: Any) -> None:
    call, pads = data.draw(calls())
    given_pattern, edit, x = (
        pattern_call(call, pads),
        MAKE["streaming"](data.draw, call),
        attention_of(call, pads),
    )
    wanted, real = z_of(x, [edit]), x.q_token >= 0
    edited = edit.before(given_pattern) if edit.touches(given_pattern) else given_pattern
    assert edited.pattern is not None and given_pattern.pattern is not None
    found = (edited.pattern @ x.values).transpose(1, 2)
    share = 1 - given_pattern.pattern.sum(-1)[real[:, None].expand(-1, x.s.shape[1], -1)]
    if (
        call.sinks is None or float(share.min()) > 1e-3
    ):  # less than that of a row is taken for rounding
        torch.testing.assert_close(found[real], wanted[real], atol=1e-6, rtol=1e-6)


def test_edits_that_need_logits_say_so_on_transformer_lens() -> None:
    q = torch.randn(1, 4, 5, 8)
    call = AttentionCall(Site("", 0, "self", "", 4, 4, 8), q, q, q, Mask(), 1.0)
    call = pattern_call(call, [0])
    z = torch.randn(1, 5, 4, 8)
    for edit in (E.PAINT("initial"), E.SigmoidAttention(length=4)):
        with pytest.raises(EditError, match="TransformerLens"):
            edit.steer(call, lambda request: pytest.fail("asked"))
    router = E.RoutedHeads(torch.zeros(1, 6, STREAM))
    for edit in (E.HeadGate(), router, E.SoftplusReweight(), E.Gate(0.5)):
        with pytest.raises(EditError, match="TransformerLens"):
            on_z = isinstance(edit, (E.HeadGate, E.RoutedHeads))
            (edit.apply if on_z else edit.attend)(call, z)


# --- VHR's and VAR's choices
# ---------------------------------------------------------------------------------------


def test_vhr_selects_above_the_median_but_outliers_of_text() -> None:
    vhd = torch.tensor([[9.0, 1, 2, 3, 4, 5], [9.0, 1, 2, 3, 4, 5]])
    text = torch.tensor([[50.0, 1, 1, 1, 1, 1], [1.0, 1, 1, 1, 1, 50]])
    chosen = E.VHR.select(vhd, text, layers=[1, 30])
    # layer 1: head 0 counts as 0, so the median of 0, 1, 2, 3, 4, 5 is 2.5; layer 30: 3.5, its
    # outlier stays
    assert [str(h) for h in chosen] == ["L1H3", "L1H4", "L1H5", "L30H0", "L30H4", "L30H5"]
    assert E.VHR(divergence=vhd, text_activation=text).heads == E.VHR.select(vhd, text)


def test_var_finds_sinks_in_a_residual_stream() -> None:
    hidden = torch.randn(2, 6, 512, generator=torch.Generator().manual_seed(0))
    hidden[0, 0, 7], hidden[1, 4, 9] = 400.0, -400.0
    found = E.VAR.find_sinks(hidden, [7, 9], tau=20)
    assert found.nonzero().tolist() == [[0, 0], [1, 4]]
