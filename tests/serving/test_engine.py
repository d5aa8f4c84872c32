"""interp_vllm.engine on a stand-in engine, against the edits on whole sequences, in float64."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from fake_engine import KINDS, FakeEngine, Sequence, sequence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp import edits as every
from interp_hooks.blocks import Tap
from interp_hooks.call import AttentionCall
from interp_hooks.engine import attend
from interp_kernels import Mask
from interp_vllm import ServingError, asking, attention, rows
from interp_vllm.program import Program
from interp_vllm.served import ServedModel
from interp_vllm.settings import Settings
from interp_vllm.step import Part

MODEL = ServedModel("stand-in", (0, 1, 2), 6, 3, 8)
EDITS: dict[str, list[Any]] = {
    "none": [],
    "gains": [every.ScaleHeads({"L0H1": 0.0, "L2H5": 2.0})],
    "zero": [every.Ablate(["L1H3", "L1H4"])],
    "shift": [every.ShiftHeads({"L2H0": [0.5] * 8, "L0H4": list(range(8))}, strength=-2.0)],
    "uniform": [every.Ablate(["L0H0", "L2H3"], mode="uniform")],
    "sharper": [every.ZeroTuning(0.3)],
    "flatter": [every.ZeroTuning({"L0H2": 4.0, "L1H5": 0.5})],
    "hidden": [every.ScaleTokens((2, 6), 0.0, heads=["L0H1", "L1H0", "L1H5"])],
    "listed": [every.ScaleTokens([0, 3, 4, 11], 5.0)],
    "warm": [every.Temperature(1.7)],
    "growing": [every.Temperature({"L1H1": 0.5, "L2H4": 2.0}, rule="ssa", beta=0.5)],
    "several": [
        every.ScaleHeads({"L0H1": 0.5, "L1H1": 3.0}, scope="decode"),
        every.ZeroTuning(2.0, queries=(4, 13)),
        every.ShiftHeads({"L0H1": [1.0] * 8}, queries=(2, None)),
        every.Temperature(0.8, scope="prefill"),
        every.Ablate(["L2H2"], queries=(3, 9)),
        every.ScaleTokens((0, 3), 0.5, scope="decode"),
    ],
}


def by_definition(one: Sequence, edits: list[Any], row: int, model: ServedModel = MODEL) -> Tensor:
    """z (tokens, heads, d) of a layer in float64: the prompt in one call, then a token a call."""
    q, k, v = (x[row].double().transpose(0, 1)[None] for x in (one.query, one.key, one.value))
    tap, total = Tap(edits=edits, backend="reference"), q.shape[2]
    parts = [(0, one.prompt), *((p, p + 1) for p in range(one.prompt, total))]
    out = []
    for start, stop in parts:
        call = AttentionCall(
            model.site(row),
            q[:, :, start:stop],
            k[:, :, :stop],
            v[:, :, :stop],
            Mask(q_start=start),
            model.d_head**-0.5,
        )
        out.append(attend(call, tap)[0])
    return torch.cat(out)


def weights_by_definition(one: Sequence, row: int, position: int) -> Tensor:
    """(heads, position + 1) float64 weights of a query, without edits."""
    q = one.query[row, position].double()
    k = one.key[row, : position + 1].double().repeat_interleave(2, 1)
    return torch.softmax(torch.einsum("hd,lhd->hl", q, k) * MODEL.d_head**-0.5, -1)


def finish(engine: FakeEngine, chunk: int = 5) -> None:
    """Runs all requests to their ends, chunk by chunk, one token at a time once generating."""
    while True:
        counts = {}
        for name, one in engine.requests.items():
            total = one.query.shape[1]
            left = one.prompt - one.done if one.done < one.prompt else min(1, total - one.done)
            if left:
                counts[name] = min(chunk, left)
        if not counts:
            return
        engine.step(counts)


def heads_of(engine: FakeEngine, one: Sequence, row: int) -> Tensor:
    return torch.stack([one.out[row, p] for p in range(one.query.shape[1])])


@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_in_one_batch(kind: str) -> None:
    engine = FakeEngine(MODEL, kind, page=4)
    for seed, (name, edits) in enumerate(EDITS.items()):
        asked = asking(edits)["interp"] if edits else None
        engine.add(sequence(name, MODEL, 3 + seed % 7, 13 + seed % 7, asked, seed))
    finish(engine)
    for name, one in engine.requests.items():
        for row in range(3):
            wanted = by_definition(one, EDITS[name], row)
            got = heads_of(engine, one, row).double()
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5, msg=name)


@pytest.mark.parametrize("name", [n for n in EDITS if n != "none"])
def test_the_edits_of_these_tests_move_something(name: str) -> None:
    one = sequence(name, MODEL, 6, 13)
    far = [by_definition(one, EDITS[name], r) - by_definition(one, [], r) for r in range(3)]
    assert max(float(x.abs().max()) for x in far) > 0.1


def test_rows_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: single rows read their pages, which hold NaN where nobody wrote, in the decode
    kernel."""
    model, page = ServedModel("stand-in", (0, 1, 2), 6, 3, 16), 16
    edits = {name: EDITS[name] for name in ("uniform", "hidden", "growing")}
    monkeypatch.setattr(rows, "DEVICES", ("cpu",))
    asked_rows = []
    own = rows.KernelRows._answer

    def answered(self: Any, *args: Any) -> Any:
        asked_rows.extend(self.lengths)
        return own(self, *args)

    monkeypatch.setattr(rows.KernelRows, "_answer", answered)
    engine = FakeEngine(model, "turned", page=page)
    for seed, (name, made) in enumerate(edits.items()):
        asked = asking(made)["interp"] if made else None
        engine.add(sequence(name, model, 3 + seed, 16 + seed % 7, asked, seed))
    finish(engine)
    assert len(asked_rows) > 30 and max(asked_rows) > page
    for name, one in engine.requests.items():
        for row in range(3):
            wanted = by_definition(one, edits[name], row, model)
            got = heads_of(engine, one, row).double()
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5, msg=name)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    page=st.sampled_from([2, 4, 8]),
    names=st.lists(st.sampled_from(sorted(EDITS)), min_size=1, max_size=3, unique=True),
    prompts=st.lists(st.integers(1, 14), min_size=3, max_size=3),
    chunk=st.integers(1, 9),
    again=st.integers(0, 12),
)
def test_any_schedule(
    kind: str, page: int, names: list[str], prompts: list[int], chunk: int, again: int
) -> None:
    """Chunks of any length, and a request whose pages were taken away in between."""
    engine = FakeEngine(MODEL, kind, page)
    for seed, (name, prompt) in enumerate(zip(names, prompts, strict=False)):
        engine.add(sequence(name, MODEL, prompt, prompt + 5, asking(EDITS[name])["interp"], seed))
    first = engine.requests[names[0]]
    for _ in range(again):
        left = {n: 1 for n, one in engine.requests.items() if one.done < one.query.shape[1]}
        if left:
            engine.step(left)
    engine.preempt(names[0])
    total = first.done or min(again, first.query.shape[1])
    while first.done < total:
        engine.step({names[0]: min(chunk, total - first.done)})
    finish(engine, chunk)
    for name, one in engine.requests.items():
        for row in range(3):
            got = heads_of(engine, one, row).double()
            torch.testing.assert_close(
                got, by_definition(one, EDITS[name], row), atol=2e-5, rtol=2e-5
            )


@pytest.mark.parametrize("name", ["uniform", "hidden", "flatter", "growing", "several"])
def test_requests_that_ask_the_same_go_together(name: str, monkeypatch: Any) -> None:
    """Of different lengths, at different places; each is as if alone, and a layer reads once."""
    calls: list[int] = []
    own = attention.rows_over

    def counted(layout: Any, cache: Any, table: Any, lengths: Any, *more: Any) -> Any:
        calls.append(len(lengths))
        return own(layout, cache, table, lengths, *more)

    monkeypatch.setattr(attention, "rows_over", counted)
    engine = FakeEngine(MODEL, "turned", 4)
    for i, (prompt, total) in enumerate([(3, 15), (9, 15), (14, 21)]):
        asked = asking(EDITS[name], {"names": ["entropy"], "stage": "after"})["interp"]
        engine.add(sequence(f"{name}-{i}", MODEL, prompt, total, asked, i))
    finish(engine)
    for one in engine.requests.values():
        for row in range(3):
            got = heads_of(engine, one, row).double()
            wanted = by_definition(one, EDITS[name], row)
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
    assert max(calls) >= 3


@pytest.mark.parametrize("name", [n for n in EDITS if n != "none"])
def test_three_ranks_hold_a_third_of_the_heads_each(name: str) -> None:
    parts = []
    for rank in range(3):
        engine = FakeEngine(MODEL, "turned", 4, rank, 3)
        engine.add(sequence(name, MODEL, 9, 14, asking(EDITS[name])["interp"], 3))
        finish(engine)
        parts.append(engine.requests[name])
    for row in range(3):
        got = torch.cat([heads_of(engine, one, row) for one in parts], 1).double()
        wanted = by_definition(parts[0], EDITS[name], row)
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


ALL = {"names": ["entropy", "first", "off_sink"], "groups": {"a": "1:4", "b": "2:40"}, "topk": 3}


@pytest.fixture(params=[4, 16])
def page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens a page; with 16, single rows go through the decode kernel, as on a GPU."""
    if request.param == 16:
        monkeypatch.setattr("interp_vllm.rows.DEVICES", ("cpu",))
    return int(request.param)


@pytest.mark.parametrize(
    "name, page",
    [("none", 4), ("sharper", 4), ("gains", 4), ("several", 4), ("sharper", 16)],
    indirect=["page"],
)
def test_statistics_of_each_generated_token(name: str, page: int) -> None:
    engine = FakeEngine(MODEL, "turned", page)
    engine.add(sequence(name, MODEL, 6, 12, asking(EDITS[name], ALL)["interp"]))
    finish(engine)
    taken = engine.engine.take(name)
    assert taken is not None
    one = engine.requests[name]
    assert taken["positions"].tolist() == list(range(5, 12))
    for t, position in enumerate(range(5, 12)):
        for row in range(3):
            a = weights_by_definition(one, row, position)
            wanted = {
                "entropy": -(a * a.log()).sum(-1),
                "first": a[:, 0],
                "off_sink": 1 - a[:, 0],
                "groups": torch.stack([a[:, 1:4].sum(-1), a[:, 2:].sum(-1)], -1),
            }
            for stat, value in wanted.items():
                torch.testing.assert_close(
                    taken[stat][t, row].double(), value, atol=1e-5, rtol=1e-5, msg=stat
                )
            n = min(3, position + 1)
            assert taken["topk_index"][t, row, :, :n].tolist() == a.topk(n).indices.tolist()


def test_statistics_after_edits_are_of_the_weights_that_acted(page: int) -> None:
    asked = {"names": ["first"], "stage": "after"}
    engine = FakeEngine(MODEL, "turned", page)
    engine.add(sequence("r", MODEL, 6, 9, asking([every.ZeroTuning(3.0)], asked)["interp"]))
    finish(engine)
    taken, one = engine.engine.take("r"), engine.requests["r"]
    assert taken is not None
    a = weights_by_definition(one, 1, 7)[:, 0]
    wanted = 3 * a / (2 * a + 1)  # γ a₀ / ((γ − 1) a₀ + 1)
    torch.testing.assert_close(taken["first"][2, 1].double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_position_computed_twice_is_one_row() -> None:
    engine = FakeEngine(MODEL, "turned", 4)
    engine.add(sequence("r", MODEL, 5, 12, asking([], ["first"])["interp"]))
    engine.step({"r": 5})
    engine.step({"r": 1})
    engine.step({"r": 1})
    engine.preempt("r")
    engine.step({"r": 7})
    finish(engine)
    taken = engine.engine.take("r")
    assert taken is not None and taken["positions"].tolist() == list(range(4, 12))


def test_statistics_stream_and_go_when_the_request_is_over() -> None:
    engine = FakeEngine(MODEL, "turned", 4)
    engine.add(sequence("r-12345678", MODEL, 5, 12, asking([], ["first"])["interp"]))
    engine.step({"r-12345678": 5})
    engine.step({"r-12345678": 1})
    first = engine.engine.take("r")
    assert first is not None and first["positions"].tolist() == [4, 5]
    finish(engine)
    engine.step({}, ("r-12345678",))
    rest = engine.engine.take("r")
    assert rest is not None and rest["positions"].tolist() == [6, 7, 8, 9, 10, 11]
    assert engine.engine.take("r") is None and not engine.engine.served


def test_rows_past_the_cap_are_counted() -> None:
    engine = FakeEngine(MODEL, "turned", 4)
    asked = asking([], {"names": ["first"], "cap": 3})["interp"]
    engine.add(sequence("r", MODEL, 5, 12, asked))
    finish(engine)
    taken = engine.engine.take("r")
    assert taken is not None
    assert taken["positions"].tolist() == [4, 5, 6] and int(taken["lost"]) == 5


@pytest.mark.parametrize("blind", [{1}, {0, 1, 2}])
def test_a_layer_that_runs_unseen_is_an_error(blind: set[int]) -> None:
    """As a layer in a replayed CUDA graph would."""
    engine = FakeEngine(MODEL, "turned", 4)
    engine.add(sequence("r", MODEL, 5, 12, asking(EDITS["gains"])["interp"]))
    engine.blind = blind
    with pytest.raises(ServingError, match="would be left out"):
        engine.step({"r": 5})


def test_requests_without_settings_may_run_in_graphs() -> None:
    engine = FakeEngine(MODEL, "turned", 4)
    engine.add(sequence("r", MODEL, 5, 12))
    engine.blind = {0, 1, 2}
    engine.step({"r": 5})


def test_an_attention_that_is_not_of_its_cache_is_refused() -> None:
    """Here logits are scaled otherwise than said."""
    engine = FakeEngine(MODEL, "turned", 4)
    for tap in engine.engine.taps:
        tap.scale *= 2
    engine.add(sequence("r", MODEL, 5, 12, asking(EDITS["sharper"])["interp"]))
    with pytest.raises(ServingError, match="not understood"):
        engine.step({"r": 5})


def test_tables_that_disagree_are_refused() -> None:
    engine = FakeEngine(MODEL, "turned", 4)
    engine.add(sequence("r", MODEL, 5, 12, asking(EDITS["gains"])["interp"]))
    engine.step({"r": 5})
    one, run = engine.requests["r"], engine.execute_model
    original = engine.input_batch

    class Late:
        req_ids = ["r"]
        num_computed_tokens_cpu = [one.done + 1]

        def __setattr__(self, name: str, value: Any) -> None:
            pass

    engine.input_batch = Late()  # type: ignore[assignment]
    with pytest.raises(ServingError, match="other rows"):
        engine.step({"r": 1})
    assert run is not None and original is not None


def test_the_same_settings_are_read_from_their_own_text() -> None:
    text = asking(EDITS["several"], ALL)["interp"]
    assert Settings.read(text).text() == text


@given(
    st.lists(st.integers(1, 40_000), min_size=1, max_size=40),
    st.integers(1, 4000),
)
def test_rows_of_like_lengths_go_together(lengths: list[int], each: int) -> None:
    """One row of a long request does not make all others as long: what is read is at most twice
    what there is, but for short rows, and within the budget where one row is."""
    parts = [Part(i, i, 1, length - 1, True, Program(), None) for i, length in enumerate(lengths)]
    groups = list(rows.alike(parts, each))
    assert sorted(part.index for group in groups for part in group) == list(range(len(parts)))
    for group in groups:
        own = [part.position + 1 for part in group]
        assert max(own) <= max(2 * min(own), rows.SHORT)
        assert len(group) == 1 or len(own) * max(own) * each <= rows.TOGETHER
    assert len(list(rows.alike(parts[:1] * 30, 1))) == 1 or lengths[0] * 30 > rows.TOGETHER


def test_a_long_request_beside_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of the short ones are read as far as these go, and each is as if alone."""
    monkeypatch.setattr(rows, "SHORT", 8)
    read = []
    own = attention.rows_over

    def noted(layout: Any, cache: Any, table: Any, lengths: Any, *more: Any) -> Any:
        read.append(len(lengths) * max(lengths) / sum(lengths))
        return own(layout, cache, table, lengths, *more)

    monkeypatch.setattr(attention, "rows_over", noted)
    engine = FakeEngine(MODEL, "turned", 4)
    for i, (prompt, total) in enumerate([(70, 80), (4, 14), (5, 14), (6, 14)]):
        asked = asking(EDITS["flatter"], {"names": ["entropy"], "stage": "after"})["interp"]
        engine.add(sequence(f"r{i}", MODEL, prompt, total, asked, i))
    finish(engine)
    assert max(read) <= 2
    for one in engine.requests.values():
        for row in range(3):
            got = heads_of(engine, one, row).double()
            wanted = by_definition(one, EDITS["flatter"], row)
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


def test_programs_of_finished_requests_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that ask the same share one; it is held as long as they run, and the last few
    after."""
    monkeypatch.setattr("interp_vllm.engine.RECENT", 2)
    engine = FakeEngine(MODEL, "turned", 4)
    made = engine.engine
    for i in range(6):
        edits = [every.ScaleHeads({"L0H1": 0.1 * i})]
        engine.add(sequence(f"r{i}", MODEL, 3, 8, asking(edits)["interp"], i))
        if i:  # beside another that asks the same
            engine.add(sequence(f"again{i}", MODEL, 3, 8, asking(edits)["interp"], i))
    finish(engine)
    assert len(made._programs) == 6
    made.begin({}, list(engine.requests))
    gc.collect()
    assert len(made._programs) == 2


def test_weights_are_made_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel: a request without statistics keeps no score a key."""
    model = ServedModel("stand-in", (0, 1, 2), 6, 3, 16)
    monkeypatch.setattr(rows, "DEVICES", ("cpu",))
    asked = []
    own = rows.KernelRows._answer

    def answered(self: Any, q: Any, change: Any, weighed: bool) -> Any:
        found = own(self, q, change, weighed)
        asked.append((weighed, found[1] is not None))
        return found

    monkeypatch.setattr(rows.KernelRows, "_answer", answered)
    for statistics in (None, {"names": ["entropy"], "stage": "after"}):
        asked.clear()
        engine = FakeEngine(model, "turned", page=16)
        given = asking(EDITS["uniform"], statistics)["interp"]
        engine.add(sequence("r", model, 18, 22, given, 0))
        finish(engine)
        assert asked and any(made for _, made in asked) == (statistics is not None)
