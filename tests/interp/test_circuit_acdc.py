"""ACDC and models with edges removed, against an untapped model whose heads and MLPs read streams
of their own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from split_stream import Split, edge_label
from test_circuit_gradients import bench_of, inputs, instances, lens_bench, margins, scores, twin

from interp.circuits.methods.acdc import ACDC
from interp.circuits.runs.edges import Graph, Stream
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, Written
from interp.circuits.runs.subgraph import Receivers, Subgraph
from interp.errors import InputError
from interp.support.checkpoints import Checkpoints
from interp_hooks import hook

NAMES = ["llama", "gpt2", "neox"]
ROWS = 2
ONE = hook(tiny.build("gpt2", n_layer=1), name="one")


def cut(name: str, mode: str = "resample") -> Subgraph:
    """All of a runs's prompts, ready to run with edges removed."""
    runs = lens_bench() if name == "lens" else bench_of(name, ROWS)
    stream = Stream(runs)
    (pairs,) = runs.batches()
    return Subgraph(stream, Receivers(runs, stream), pairs, mode)


def matrix(name: str, graph: Graph, edges: list[Any]) -> torch.Tensor:
    """(1, senders, receivers), 1 at `edges` of the reference."""
    found = torch.zeros(1, *graph.allowed.shape)
    for edge in edges:
        sender, receiver, kind = edge_label(name, edge)
        found[0, graph.senders.index(sender), graph.receivers.index((receiver, kind))] = 1
    return found


def stand_ins(split: Split, mode: str) -> dict[Any, torch.Tensor]:
    _, other = split.run(inputs(instances(ROWS), "corrupted"))
    return {u: torch.zeros_like(x) for u, x in other.items()} if mode == "zero" else other


@pytest.mark.parametrize("name", NAMES)
def test_all_edges_removed_is_the_corrupted_run_and_none_the_clean_one(name: str) -> None:
    sub = cut(name)
    whole = torch.from_numpy(sub.graph.allowed).float()
    found = sub.logits(torch.stack([torch.zeros_like(whole), whole]), 0)
    for one, which in zip(found, ("ids", "corrupted"), strict=True):
        wanted = twin(name)(**inputs(instances(ROWS), which), use_cache=False).logits[:, -1]
        torch.testing.assert_close(one[:, -1].double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["resample", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_edges_removed_at_random_give_the_reference_with_split_streams(
    name: str, mode: str
) -> None:
    """What a removed edge takes off is its sender as it is in that run, whatever else is
    removed."""
    sub, split = cut(name, mode), Split(name, twin(name))
    other = stand_ins(split, mode)
    draw = np.random.default_rng(1)
    for start in (0, 1):
        usable = [
            e
            for e in split.edges
            if start == 0 or e[1] == "output" or e[1] == ("mlp", 1) or e[1][0] == 1
        ]
        removed = [usable[i] for i in draw.choice(len(usable), len(usable) // 3, replace=False)]
        wanted, _ = split.run(inputs(instances(ROWS)), other, dict.fromkeys(removed, 1.0))
        found = sub.logits(matrix(name, sub.graph, removed), start)[0]
        torch.testing.assert_close(found[:, -1].double(), wanted[:, -1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_projections_are_the_modules_own_and_replaceable(name: str) -> None:
    """A change of one head's raw values moves z of the heads that read it and no other."""
    runs, seen = bench_of(name, 1), {}
    (pairs,) = runs.batches()

    def double(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        seen[place, layer] = tensor
        if (place, layer) != ("v", 1):
            return None
        new = tensor.clone()
        new[:, :, 1] *= 2
        return new

    _, before = runs.run(pairs, keep=("z",))
    with runs.model.projections(double):
        _, after = runs.run(pairs, keep=("z",))
    readers = [h for h in range(4) if runs.sites[1].kv_head(h) == 1]
    others = [h for h in range(4) if h not in readers]
    torch.testing.assert_close(after["z", 1][:, :, readers], 2 * before["z", 1][:, :, readers])
    torch.testing.assert_close(after["z", 1][:, :, others], before["z", 1][:, :, others])
    assert set(seen) == {(place, layer) for place in "qkv" for layer in (0, 1)}


@pytest.mark.parametrize("name", NAMES)
def test_resuming_skips_blocks_and_leaves_the_model_as_it_was(name: str) -> None:
    runs = bench_of(name, ROWS)
    (pairs,) = runs.batches()
    with torch.no_grad(), runs.model.block_outputs() as outputs:
        wanted, _ = runs.logits(pairs, pairs.clean)
    calls = []
    attention = tiny.layers(runs.model.module)[0]
    handle = attention.register_forward_hook(lambda *given: calls.append(1))
    try:
        with torch.no_grad(), runs.model.resume(1, outputs[0]):
            found, _ = runs.logits(pairs, pairs.clean)
        assert not calls
        torch.testing.assert_close(found, wanted)
        with torch.no_grad():
            runs.logits(pairs, pairs.clean)
        assert calls
    finally:
        handle.remove()


def greedy(name: str, tau: float, metric: str) -> set[tuple[str, str, str]]:
    """Algorithm 1 of the paper as it stands, every edge with a run of its own."""
    rows = instances(ROWS)
    split = Split(name, twin(name))
    other = stand_ins(split, "resample")
    own = split.run(inputs(rows))[0][:, -1].log_softmax(-1)

    def loss(removed: dict[Any, float]) -> float:
        logits, _ = split.run(inputs(rows), other, removed)
        if metric == "margin":
            return -float(margins(logits, rows).mean())
        return float((own.exp() * (own - logits[:, -1].log_softmax(-1))).sum(-1).mean())

    removed: dict[Any, float] = {}
    now = loss(removed)
    order = {u: i for i, u in enumerate(split.senders)}
    receivers = list(dict.fromkeys(v for _, v in split.edges))
    for v in reversed(receivers):
        for u in sorted((u for u, w in split.edges if w == v), key=lambda u: -order[u]):
            without = loss({**removed, (u, v): 1.0})
            if without - now < tau:
                removed[u, v], now = 1.0, without
    return {edge_label(name, e) for e in split.edges if e not in removed}


@pytest.mark.parametrize(("name", "metric"), [("llama", "kl"), ("neox", "margin")])
def test_what_survives_is_what_the_plain_algorithm_keeps(name: str, metric: str) -> None:
    """Also with thresholds side by side, and without the runs for heads of which nothing is
    left."""
    thresholds = (0.02, 0.1)
    found = ACDC(thresholds, metric).find(bench_of(name, ROWS))
    survivors = scores(found)
    for tau in thresholds[1:]:
        kept = {edge for edge, score in survivors.items() if score >= np.float32(tau)}
        wanted = greedy(name, tau, metric)
        # an edge into a node of which nothing is left has no effect, and goes in both
        assert kept == wanted and kept
    alone = scores(ACDC(thresholds[:1], metric).find(bench_of(name, ROWS)))
    assert alone.keys() <= survivors.keys()
    assert {e for e, s in survivors.items() if s == np.float32(thresholds[0])} <= alone.keys()
    heads = bench_of(name, ROWS).heads
    for head, score in zip(heads, found.score, strict=True):
        own = [s for (sender, _, _), s in survivors.items() if sender == str(head)]
        assert score == pytest.approx(max(own, default=0.0))


def test_gpt2_small_has_as_many_edges_as_the_paper_says() -> None:
    """Conmy et al., section 4: 32,491 edges with queries, keys and values apart."""
    runs: Any = SimpleNamespace(
        sites={layer: SimpleNamespace(n_heads=12, n_kv_heads=12) for layer in range(12)}
    )
    assert Graph.of(runs, False, dict.fromkeys(range(12), True)).allowed.sum() == 32491


def test_a_high_threshold_keeps_nothing_and_needs_few_runs() -> None:
    runs = bench_of("llama", ROWS)
    found = ACDC((1e6,)).find(runs)
    assert found.edges is not None and found.edges.empty and not found.score.any()
    senders = 1 + 2 * (4 + 1)  # only the edges into the output are tried
    assert runs.forwards <= senders + 6


def test_settings_that_make_no_sense_are_refused() -> None:
    for make in (
        lambda: ACDC(()),
        lambda: ACDC((0.0,)),
        lambda: ACDC((float("nan"),)),
        lambda: ACDC(metric="accuracy"),
        lambda: ACDC(mode="mean"),
    ):
        with pytest.raises(InputError):
            make()


@pytest.mark.parametrize("name", ["qwen3", "phi3", "opt", "gpt_oss", "lens"])
def test_other_projections_and_norms_run_too(name: str) -> None:
    sub = cut(name)
    whole = torch.from_numpy(sub.graph.allowed).float()[None]
    found = sub.logits(whole, 0)[0]
    with torch.no_grad():
        wanted, _ = sub.runs.logits(sub.pairs, sub.pairs.corrupted)
        clean, _ = sub.runs.logits(sub.pairs, sub.pairs.clean)
    torch.testing.assert_close(
        found[:, -1], wanted[:, -1], rtol=2e-3, atol=2e-3 * float(wanted.abs().max())
    )
    assert float((clean - wanted)[:, -1].abs().max()) > 0.05 * float(wanted.abs().max())


def small() -> PairedRuns:
    """One layer of GPT-2's make: 32 edges."""
    return PairedRuns(ONE, Prompts(Written(), instances(1)))


def test_edges_side_by_side_are_decided_as_one_by_one() -> None:
    one, other = (ACDC((0.003, 0.03, 0.3), at_once=n).find(small()) for n in (1, 5))
    assert one.edges is not None and other.edges is not None
    assert scores(one) == scores(other) and 3 < len(scores(one)) < 30
    assert "passes over the prompts" in other.notes[0] and "seconds" in other.notes[0]


class Stopped(Exception):
    pass


def test_an_interrupted_search_resumes_and_finds_the_same(tmp_path: Path) -> None:
    method, whole = ACDC(thresholds=(0.003, 0.3)), small()
    wanted = method.find(whole)

    def stop(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise Stopped

    model, prompts = whole.model, whole.prompts
    with pytest.raises(Stopped):
        method.find(PairedRuns(model, prompts, 0, stop, Checkpoints(tmp_path, {})))
    pieces = Checkpoints(tmp_path, {})
    assert pieces.kept > 1
    again = PairedRuns(model, prompts, 0, None, pieces)
    before, run = again.forwards, []
    logits = again.logits
    again.logits = lambda *args, **more: run.append(1) or logits(*args, **more)  # type: ignore
    found = method.find(again)
    assert scores(found) == scores(wanted)
    assert again.forwards - before == whole.forwards  # counted with those of the first
    fresh: list[int] = []
    other = PairedRuns(model, prompts)
    own = other.logits
    other.logits = lambda *args, **more: fresh.append(1) or own(*args, **more)  # type: ignore
    method.find(other)
    assert len(run) < 0.8 * len(fresh)
