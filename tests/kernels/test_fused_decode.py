"""interp_kernels.fused.decode against an explicit float64 attention matrix that is edited weight by
weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from loose import decode

from interp_kernels import Mask
from interp_kernels.fused.decode import Decoded
from interp_kernels.steer import Rule, Steer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Of outputs relative to max |v| of a few: weights are rounded to v's type before they meet it.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """Thousands of tiny operations: a second thread only waits at barriers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    steer: Steer,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(edited output, lse, scores, weights before the rule, masses) in float64 from the whole
    matrix."""
    batch, heads, lq, _ = q.shape
    lk = k.shape[2]
    q, k, v = (x.detach().cpu().double() for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))

    def full(value: Tensor | None, *shape: int) -> Tensor:
        return torch.ones(()) if value is None else value.detach().cpu().double().expand(*shape)

    s = scale * (q @ k.transpose(2, 3))
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s * full(steer.temper, batch, heads, lq)[..., None]
    if steer.bias is not None:
        s = s + full(steer.bias, batch, heads, lk)[:, :, None]
    row, col = torch.arange(lq)[:, None] + mask.q_start, torch.arange(lk)[None] + mask.k_start
    hidden = torch.zeros(lq, lk, dtype=torch.bool)
    if mask.causal:
        hidden |= col > row
    if mask.window is not None:
        hidden |= (row - col).abs() >= mask.window
    if mask.keys is not None:
        hidden = hidden | ~mask.keys.cpu()[:, None, None]
    s = s.masked_fill(hidden, -math.inf)
    logits = s
    if sinks is not None:
        logits = torch.cat(
            [s, sinks.cpu().double()[None, :, None, None].expand(*s.shape[:3], 1)], 3
        )
    empty = (s == -math.inf).all(-1)
    lse = logits.masked_fill(empty[..., None], 0).logsumexp(-1).masked_fill(empty, -math.inf)
    a = torch.exp(s - lse.masked_fill(empty, 0)[..., None])

    edited, masses = a.clone(), None
    if steer.rule is not None:
        rule = steer.rule
        if steer.labels is not None:
            labels = steer.labels.cpu().long().expand(batch, heads, lk)
        else:
            labels = torch.zeros(batch, heads, lk, dtype=torch.long)
            for start, stop, group in steer.spans:
                labels[..., start:stop] = group
        masses = torch.zeros(batch, heads, lq, rule.groups, dtype=torch.float64)
        keep = full(rule.keep, heads, rule.groups)
        for b in range(batch):
            for h in range(heads):
                for i in range(lq):
                    group = labels[b, h]
                    p = [float(a[b, h, i][group == g].sum()) for g in range(rule.groups)]
                    masses[b, h, i] = torch.tensor(p)
                    if rule.rows is not None and not rule.rows[b, i]:
                        continue
                    if rule.tests is not None and rule.bounds is not None:
                        sums = rule.tests.cpu().double() @ torch.tensor(p, dtype=torch.float64)
                        if not bool((sums >= rule.bounds.cpu().double()).all()):
                            continue
                    held = keep[h].clone()
                    if rule.renormalise and rule.receive is not None:
                        least = full(rule.receive, heads, rule.groups)[h]
                        for g, m in enumerate(p):
                            held[g] = max(held[g], least[g] / m) if m > 1e-12 else held[g]
                    weights = a[b, h, i] * held[group]
                    if rule.renormalise:
                        sink = float(1 - a[b, h, i].sum()) if sinks is not None else 0.0
                        whole = float(weights.sum()) + sink
                        weights = weights / whole if whole > 0 else weights
                    elif rule.receive is not None:
                        receive = full(rule.receive, heads, rule.groups)[h]
                        taken = float(a[b, h, i].sum() - weights.sum())
                        gets = a[b, h, i] * receive[group]
                        if float(gets.sum()) > 0:
                            weights = weights + taken * gets / gets.sum()
                        elif bool((receive != 0).any()):
                            continue  # no receiver is visible
                    edited[b, h, i] = weights
    if steer.blend is not None:
        u = full(steer.blend, heads)[None, :, None, None]
        own = (
            (row == col) & ~hidden
        ).double()  # a row that does not see its own key stays as it is
        u = u * own.sum(-1, keepdim=True)
        edited = (1 - u) * edited + u * own
    out = (edited @ v) * full(steer.gain, batch, heads, lq)[..., None]
    return out, lse, s, a, masses


def check(
    got: Decoded,
    want: tuple[Any, ...],
    mask: Mask,
    topk: int,
    tolerance: float,
    exact: float = 3e-5,
) -> None:
    """Outputs to `tolerance`, statistics to `exact`; top-k against a sort of the float64
    weights."""
    out, lse, scores, a, masses = want
    assert torch.isfinite(got.out).all()
    torch.testing.assert_close(got.out.cpu().double(), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.lse.cpu().double(), lse, rtol=exact, atol=exact)
    if got.scores is not None:
        torch.testing.assert_close(got.scores.cpu().double(), scores, rtol=exact, atol=exact)
    if masses is not None:
        assert got.masses is not None
        torch.testing.assert_close(got.masses.cpu().double(), masses, rtol=exact, atol=exact)
    assert (got.topk_index is None) == (topk == 0)
    if got.topk_index is None or got.topk_prob is None:
        return
    index, prob = got.topk_index.cpu(), got.topk_prob.cpu().double()
    visible = scores > -math.inf
    real = (
        torch.ones(a.shape[0], a.shape[2], dtype=torch.bool)
        if mask.queries is None
        else mask.queries.cpu()
    )
    visible = visible & real[:, None, :, None]
    n = min(topk, a.shape[-1])
    best = torch.where(visible, a, -1.0).sort(-1, descending=True).values[..., :n]
    best = torch.nn.functional.pad(best, (0, topk - n), value=-1.0)
    assert torch.equal(index >= 0, best >= 0)
    torch.testing.assert_close(prob, best.clamp_min(0), rtol=exact, atol=exact)
    assert ((index < 0) | visible.gather(-1, index.clamp_min(0))).all()
    mine = a.gather(-1, index.clamp_min(0)).masked_fill(index < 0, 0)
    torch.testing.assert_close(mine, prob, rtol=exact, atol=exact)
    if got.scores is not None:  # then also exact, ties by the lowest column
        shown = torch.where(visible, got.scores.cpu().double(), -math.inf)
        order = torch.sort(shown, stable=True, dim=-1, descending=True).indices[..., :n]
        if topk <= 16:
            assert torch.equal(torch.where(index[..., :n] < 0, -1, order), index[..., :n])
        else:
            mine = shown.gather(-1, index[..., :n].clamp_min(0))
            assert torch.equal(
                torch.where(index[..., :n] < 0, -math.inf, mine), shown.gather(-1, order)
            )
    listed = index.sort(-1).values
    assert ((listed[..., 1:] != listed[..., :-1]) | (listed[..., 1:] < 0)).all()


def paged(x: Tensor, size: int, table: Tensor) -> Tensor:
    """(batch, heads, keys, d) spread over pages (total, heads, size, d) as `table` says; the rest
    is NaN."""
    batch, heads, lk, d = x.shape
    made = torch.full((int(table.max()) + 2, heads, size, d), math.nan, dtype=x.dtype)
    for b in range(batch):
        for c in range(lk):
            made[table[b, c // size], :, c % size] = x[b, :, c]
    return made


def make_rule(
    draw: Any, gen: torch.Generator, batch: int, heads: int, lq: int, lk: int
) -> dict[str, Any]:
    """Arguments of a Steer: a rule of some kind over labels or spans."""
    kind = draw(st.sampled_from(["act", "act-heads", "var", "renormalise", "drop", "many", "one"]))
    groups = {"var": 4, "many": 8, "drop": 3, "one": 1}.get(kind, 2)
    several = draw(st.sampled_from([1, heads]))
    rule: dict[str, Any] = {
        "keep": torch.tensor([[1.0, 0.3]]),
        "receive": torch.tensor([[1.0, 0.0]]),
    }
    if kind == "act-heads":
        rule = {
            "keep": torch.rand(heads, 2, generator=gen),
            "receive": torch.rand(heads, 2, generator=gen) > 0.5,
        }
        rule["receive"] = rule["receive"].float()
    elif kind == "var":  # group 1 and 3 donate, 2 receives, where two conditions on the masses hold
        rule = {
            "keep": torch.tensor([[1.0, 0.4, 1.0, 0.0]]).expand(several, 4),
            "receive": torch.tensor([[0.0, 0.0, 1.0, 0.0]]).expand(several, 4),
            "tests": torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, -0.6, 0.4, -0.6]]),
            "bounds": torch.tensor([0.1, -0.4]),
        }
    elif kind == "renormalise":
        rule = {"keep": 2 * torch.rand(several, 2, generator=gen), "renormalise": True}
        if draw(st.booleans()):
            rule["keep"][:, 1] = 0.0
        if draw(st.booleans()):
            rule["receive"] = torch.rand(several, 2, generator=gen)
    elif kind == "drop":
        rule = {"keep": torch.rand(several, 3, generator=gen)}
        if draw(st.booleans()):
            rule["receive"] = torch.zeros(1, 3)
    elif kind == "many":
        rule = {
            "keep": torch.rand(several, 8, generator=gen),
            "receive": torch.rand(1, 8, generator=gen),
        }
    elif kind == "one":
        rule = {"keep": torch.rand(several, 1, generator=gen)}
    if draw(st.integers(0, 3)) == 0:
        rule["rows"] = torch.rand(batch, lq, generator=gen) > 0.4
    where: dict[str, Any] = {}
    if draw(st.booleans()):
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), lk)
        top = draw(st.sampled_from([groups, max(1, groups - 1)]))  # one group may have no key
        dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
        where["labels"] = torch.randint(0, top, shape, generator=gen).to(dtype)
    else:
        spans = []
        for _ in range(draw(st.sampled_from([1, 2, 4, 6]))):
            a, b = sorted(torch.randint(0, lk + 1, (2,), generator=gen).tolist())
            spans.append((a, b, int(torch.randint(0, groups, (), generator=gen))))
        where["spans"] = tuple(spans)
    return {"rule": Rule(**rule), **where}


def to_device(steer: Steer) -> Steer:
    rule = steer.rule
    if rule is not None:
        rule = Rule(
            **{n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in vars(rule).items()}
        )
    fields = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in vars(steer).items()}
    return Steer(**{**fields, "rule": rule})


#: (batch, kv heads, query heads a kv head, queries): the interpreter takes some 10 ms a row.
SIZES = [
    (1, 1, 3, 1),
    (2, 2, 1, 1),
    (1, 1, 4, 1),
    (2, 1, 2, 1),
    (1, 2, 2, 2),
    (1, 1, 2, 3),
    (2, 1, 1, 2),
]


@pytest.mark.slow
@given(st.data())
@examples(60)
def test_decode_is_the_edited_matrix(data: Any) -> None:
    draw = data.draw
    gen = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    d, most = draw(st.sampled_from([(16, 150), (16, 150), (16, 150), (64, 70), (80, 40), (96, 40)]))
    d_v = draw(st.sampled_from([d, d, 16, 24]))
    batch, n_kv, group, lq = draw(st.sampled_from(SIZES))
    heads, lk = n_kv * group, draw(st.integers(1, most))
    dtype = draw(
        st.sampled_from(
            [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16]
        )
    )
    kind = draw(st.sampled_from(["decode", "decode", "rolled", "static", "cross", "early"]))
    causal, q_start, k_start = kind != "cross", max(lk - lq, 0), 0
    window = draw(st.sampled_from([None, None, 1, 7, 40]))
    if kind == "rolled":
        k_start = 5
        q_start += 5
    elif kind == "static":
        q_start = max(lk - 40, 0)
    elif kind == "early":  # the first rows stand before every key
        k_start, q_start = 3, 2
    keys = None
    side = draw(st.sampled_from(["", "left", "holes", "none"]))
    if side:
        keys = torch.rand(batch, lk, generator=gen) > 0.3
        if side == "left":
            lengths = torch.randint(0, lk + 1, (batch, 1), generator=gen)
            keys = (torch.arange(lk) >= lengths) & (keys | (torch.arange(lk) > lk // 2))
        elif side == "none":
            keys[0] = False
    queries = torch.rand(batch, lq, generator=gen) > 0.3 if draw(st.integers(0, 3)) == 0 else None
    mask = Mask(
        causal=causal,
        window=window,
        q_start=q_start,
        k_start=k_start,
        keys=None if keys is None else keys.to(DEVICE),
        queries=None if queries is None else queries.to(DEVICE),
    )
    q, k, v = randn(batch, lq, heads, d), randn(batch, lk, n_kv, d), randn(batch, lk, n_kv, d_v)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    if draw(st.booleans()):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    edit: dict[str, Any] = {}
    few = [draw(st.sampled_from([1, n])) for n in (batch, heads, lq)]
    if draw(st.integers(0, 2)) == 0:
        edit["temper"] = 2 * torch.rand(few, generator=gen)
    if draw(st.integers(0, 2)) == 0:
        edit["bias"] = randn(few[0], few[1], lk).masked_fill(
            torch.rand(few[0], few[1], lk, generator=gen) < 0.2, -math.inf
        )
    if draw(st.integers(0, 4)) > 0:
        edit |= make_rule(draw, gen, batch, heads, lq, lk)
    if draw(st.integers(0, 2)) == 0:
        edit["blend"] = torch.rand(few[1], generator=gen)
    if draw(st.integers(0, 2)) == 0:
        edit["gain"] = randn(*few)
    steer = Steer(**edit)
    softcap = draw(st.sampled_from([None, None, 1.5]))
    sinks = 2 * randn(heads) if draw(st.integers(0, 2)) == 0 else None
    scale = draw(st.sampled_from([d**-0.5, 1.0]))
    topk, scores = draw(st.sampled_from([0, 1, 5, 16, 40])), draw(st.booleans())
    n_splits = draw(st.sampled_from([None, 1, 2, 5]))
    want = expected(q, k, v, mask, scale, softcap, sinks, steer)
    got = decode(
        q.to(DEVICE),
        k.to(DEVICE),
        v.to(DEVICE),
        mask=mask,
        scale=scale,
        softcap=softcap,
        sinks=None if sinks is None else sinks.to(DEVICE),
        steer=to_device(steer) if steer else None,
        topk=topk,
        scores=scores,
        n_splits=n_splits,
    )
    assert got.out.dtype == dtype
    assert (got.scores is None) == (not scores)
    check(got, want, mask, topk, TOLERANCE[dtype])


@pytest.mark.parametrize("block", [16, 64])
def test_tiles_of_any_width(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp_kernels.fused.decode_launch._BLOCK_N", block)
    gen = torch.Generator().manual_seed(block)
    q, k, v = (torch.randn(1, h, n, 32, generator=gen) for h, n in ((4, 1), (2, 150), (2, 150)))
    mask = Mask(q_start=149, window=100)
    steer = Steer(
        spans=((3, 90, 1),), rule=Rule(torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 0.0]]))
    )
    want = expected(q, k, v, mask, 0.2, None, None, steer)
    got = decode(
        q.to(DEVICE),
        k.to(DEVICE),
        v.to(DEVICE),
        mask=mask,
        scale=0.2,
        steer=to_device(steer),
        topk=5,
        scores=True,
        n_splits=3,
    )
    check(got, want, mask, 5, TOLERANCE[torch.float32])


def test_many_rows_take_several_programs() -> None:
    gen = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, h, n, 16, generator=gen) for h, n in ((8, 3), (1, 70), (1, 70)))
    mask = Mask(q_start=67)
    edit = Steer(
        labels=torch.randint(0, 8, (1, 8, 70), generator=gen),
        rule=Rule(torch.rand(8, 8, generator=gen)),
    )
    got = decode(
        q.to(DEVICE),
        k.to(DEVICE),
        v.to(DEVICE),
        mask=mask,
        scale=0.5,
        steer=to_device(edit),
        topk=4,
        scores=True,
    )
    check(got, expected(q, k, v, mask, 0.5, None, None, edit), mask, 4, TOLERANCE[torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 64])
def test_pages_are_the_contiguous_cache(size: int) -> None:
    """Also when the table's unused entries point nowhere and unused slots hold NaN."""
    gen = torch.Generator().manual_seed(size)
    n_pages = 192 // size
    q = torch.randn(2, 4, 1, 32, generator=gen)
    k, v = torch.randn(2, 2, 192, 32, generator=gen), torch.randn(2, 2, 192, 16, generator=gen)
    table = torch.randperm(2 * n_pages, generator=gen).view(2, n_pages).to(torch.int32)
    lengths = torch.tensor([[150], [61]])
    keys = torch.arange(192) < lengths
    mask = Mask(causal=False, keys=keys.to(DEVICE), q_start=60)
    steer = Steer(
        spans=((0, 4, 1),),
        rule=Rule(torch.tensor([[1.0, 0.2]]), torch.tensor([[1.0, 0.0]])),
        blend=torch.tensor([0.25]),
    )
    want = expected(q, k, v, mask, 0.3, None, None, steer)
    pool_k, pool_v = (
        paged(torch.where(keys[:, None, :, None], x, math.nan), size, table) for x in (k, v)
    )
    used = torch.arange(n_pages) * size < lengths
    table = torch.where(used, table, 10**6).to(torch.int32)
    kwargs: dict[str, Any] = {
        "mask": mask,
        "scale": 0.3,
        "steer": to_device(steer),
        "topk": 5,
        "scores": True,
    }
    got = decode(
        q.to(DEVICE), pool_k.to(DEVICE), pool_v.to(DEVICE), pages=table.to(DEVICE), **kwargs
    )
    check(got, want, mask, 5, TOLERANCE[torch.float32])
    flat = decode(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), **kwargs)
    for name in ("out", "lse", "scores", "topk_index", "topk_prob", "masses"):
        assert torch.equal(getattr(got, name), getattr(flat, name)), name


def test_ties_go_to_the_lowest_column() -> None:
    k = torch.zeros(1, 1, 200, 16, device=DEVICE)
    k[:, :, 150:] = 1.0
    got = decode(
        torch.ones(1, 2, 1, 16, device=DEVICE),
        k,
        k,
        mask=Mask(q_start=199),
        scale=0.1,
        topk=16,
        n_splits=2,
    )
    assert got.topk_index is not None
    assert got.topk_index[0, 1, 0].tolist() == list(range(150, 166))


def test_a_row_that_sees_nothing() -> None:
    q, k = torch.ones(1, 2, 1, 16, device=DEVICE), torch.ones(1, 1, 40, 16, device=DEVICE)
    for mask in (
        Mask(q_start=2, k_start=3),
        Mask(q_start=39, keys=torch.zeros(1, 40, dtype=torch.bool, device=DEVICE)),
    ):
        steer = Steer(
            spans=((0, 9, 1),),
            rule=Rule(torch.tensor([[1.0, 0.0]], device=DEVICE), renormalise=True),
        )
        sinks = torch.ones(2, device=DEVICE)
        got = decode(q, k, k, mask=mask, scale=1.0, topk=3, scores=True, steer=steer, sinks=sinks)
        assert got.topk_index is not None and got.topk_prob is not None
        assert got.scores is not None and got.masses is not None
        assert (
            (got.out == 0).all()
            and (got.lse == -math.inf).all()
            and (got.scores == -math.inf).all()
        )
        assert (
            (got.topk_index == -1).all() and (got.topk_prob == 0).all() and (got.masses == 0).all()
        )


def test_what_it_does_not_serve() -> None:
    q = torch.ones(1, 2, 1, 16, device=DEVICE)
    with pytest.raises(ValueError, match="blend under a dense mask"):
        seen = Mask(dense=torch.ones(1, 1, 1, 1, dtype=torch.bool))
        blend = Steer(blend=torch.ones(1, device=DEVICE))
        decode(q, q, q, mask=seen, scale=1.0, steer=blend)
    with pytest.raises(ValueError, match="sigmoid"):
        decode(q, q, q, mask=Mask(), scale=1.0, steer=Steer(sigmoid=0.0))
    with pytest.raises(ValueError, match="dtype"):
        decode(q.double(), q.double(), q.double(), mask=Mask(), scale=1.0)
    with pytest.raises(ValueError, match="powers of two"):
        decode(
            q,
            q,
            q,
            mask=Mask(),
            scale=1.0,
            pages=torch.zeros(1, 1, dtype=torch.int32, device=DEVICE),
        )


@pytest.mark.slow
def test_the_op_and_its_fake_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from interp_kernels.fused import decode as module

    calls = []
    op = module._decode
    monkeypatch.setattr(module, "_decode", lambda *args: (calls.append(args), op(*args))[1])
    gen = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, n, 16, generator=gen).to(DEVICE) for h, n in ((4, 1), (2, 40), (2, 40))
    )
    steer = to_device(Steer(spans=((0, 3, 1),), rule=Rule(torch.tensor([[1.0, 0.5]]))))
    decode(q, k, v, mask=Mask(q_start=39), scale=0.5)
    decode(q, k, v, mask=Mask(q_start=39), scale=0.5, steer=steer, topk=3, scores=True)
    decode(q, k, v, mask=Mask(q_start=39), scale=0.5, topk=20)
    for args in calls:
        torch.library.opcheck(op, args)
