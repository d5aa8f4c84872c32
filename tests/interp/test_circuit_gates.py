"""Edge pruning and head gating: gates of 0, 1 and between against patched runs, and what they learn
where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_circuit_atp_star import one_layer
from test_circuit_gradients import bench_of, instances

from interp.circuits.finding import find
from interp.circuits.known import planted as planted_circuits
from interp.circuits.methods.edge_pruning import EdgePruning
from interp.circuits.methods.head_gating import HeadGating, answer_loss, classified
from interp.circuits.runs.edges import Stream
from interp.circuits.runs.gates import (
    BETA,
    chance_open,
    gated_logits,
    hard_concrete,
    settled,
)
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, Written
from interp.circuits.runs.subgraph import Receivers, Subgraph
from interp.errors import InputError


def planted() -> PairedRuns:
    """One attention and nothing after it; the right token is the one that head 2 speaks for most
    when it changes from the twin's to its own, head 1 speaks against."""
    return PairedRuns(one_layer(), Prompts(Written(), instances(3)))


def test_gates_of_zero_replace_and_of_one_leave_a_head() -> None:
    runs = bench_of("llama", 2)
    (pairs,) = runs.batches()
    stand_ins = runs.stand_ins(pairs, "resample")
    clean = runs.run(pairs)[0]
    gates = torch.ones(8)
    assert torch.equal(pairs.margins(gated_logits(runs, pairs, gates, stand_ins)), clean)
    gates[3] = 0
    found = pairs.margins(gated_logits(runs, pairs, gates, stand_ins))
    torch.testing.assert_close(found, runs.without(pairs, [runs.heads[3]], stand_ins))


def test_gradients_of_gates_are_those_of_mixing() -> None:
    runs = bench_of("gpt2", 2)
    (pairs,) = runs.batches()
    stand_ins = runs.stand_ins(pairs, "resample")
    gates = torch.full((8,), 0.5, requires_grad=True)
    m = pairs.margins(gated_logits(runs, pairs, gates, stand_ins)).sum()
    (slope,) = torch.autograd.grad(m, gates)
    for i in (0, 6):
        ends = []
        for by in (0.01, -0.01):
            moved = gates.detach().clone()
            moved[i] += by
            ends.append(float(pairs.margins(gated_logits(runs, pairs, moved, stand_ins)).sum()))
        assert float(slope[i]) == pytest.approx((ends[0] - ends[1]) / 0.02, rel=0.02, abs=1e-3)


def test_gradients_flow_to_edges() -> None:
    runs = bench_of("llama", 2)
    stream = Stream(runs)
    (pairs,) = runs.batches()
    sub = Subgraph(stream, Receivers(runs, stream), pairs, "resample")
    shut = 0.3 * torch.from_numpy(stream.graph.allowed).float()[None]
    shut.requires_grad_()
    m = pairs.margins(sub.live(shut, 0)[0]).sum()
    (slope,) = torch.autograd.grad(m, shut)
    for u, v in ((0, 0), (1, 9), (6, len(stream.graph.receivers) - 1)):
        assert stream.graph.allowed[u, v]
        ends = []
        for by in (0.01, -0.01):
            moved = shut.detach().clone()
            moved[0, u, v] += by
            ends.append(float(pairs.margins(sub.logits(moved, 0)[0]).sum()))
        assert float(slope[0, u, v]) == pytest.approx(
            (ends[0] - ends[1]) / 0.02, rel=0.05, abs=2e-3
        )


def test_hard_concrete_gates_are_shut_as_often_as_they_say() -> None:
    alpha = torch.tensor([-3.0, -1.0, 0.0, 2.0])[:, None].expand(4, 20000)
    drawn = hard_concrete(alpha, torch.Generator().manual_seed(0))
    assert float(drawn.min()) == 0 and float(drawn.max()) == 1
    often = (drawn > 0).double().mean(1)
    torch.testing.assert_close(often, chance_open(alpha[:, 0]).double(), rtol=0, atol=0.015)
    assert pytest.approx(2 / 3) == BETA and settled(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]


def test_head_gating_tells_heads_that_help_from_heads_that_hurt() -> None:
    """Where logits are linear in z: each head's effect on the answer, all others open, has the sign
    of its class, or is within the price."""
    runs = planted()
    found = HeadGating(steps=60, mode="resample", price=0.02).find(runs)
    (pairs,) = runs.batches()
    stand_ins = runs.stand_ins(pairs, "resample")

    def loss(gates: torch.Tensor) -> float:
        return float(answer_loss(pairs, gated_logits(runs, pairs, gates, stand_ins)).mean())

    best = min(
        ((loss(torch.tensor([float(x) for x in f"{i:04b}"])), f"{i:04b}") for i in range(16)),
    )
    pushed_open = np.array([float(x) for x in best[1]])
    # the best of all 16 settings of open and shut is what opening finds, where no head is in doubt
    for h in range(4):
        other = pushed_open.copy()
        other[h] = 1 - other[h]
        if loss(torch.tensor(other, dtype=torch.float32)) - best[0] > 0.05:
            assert (found.effect[h] > 0) == bool(pushed_open[h]), (h, found.effect, best)
    assert found.score.max() <= 1 and found.score.min() >= 0
    assert "facilitating" in found.notes[1] and "interfering" in found.notes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["induction", "ioi"])
def test_gates_find_the_planted_heads(name: str) -> None:
    """What is written into the weights is facilitating, and nothing else is."""
    made = planted_circuits.get(name)
    found = find(made.model, made.task, "head_gating", n=8)
    gates = {h: found["head_gating"][h.layer, h.head] for h in made.model.heads}
    assert {h for h, gate in gates.items() if gate > 0.5} == set(made.truth.heads)
    pruned = find(made.model, made.task, "edge_pruning", n=8, over="heads", sparsity=0.8)
    assert set(pruned.heads(len(made.truth.heads))) == set(made.truth.heads)


def test_classes_follow_both_gates() -> None:
    shut, opened = np.array([0.9, 0.1, 0.1]), np.array([0.9, 0.1, 0.9])
    assert list(classified(shut, opened)) == ["facilitating", "interfering", "irrelevant"]


@pytest.mark.parametrize("over", ["edges", "heads"])
def test_pruning_keeps_what_the_answers_need(over: str) -> None:
    """The gates that stay keep the answers nearer than as many others, drawn at random."""
    runs = bench_of("llama", 2) if over == "heads" else planted()
    found = EdgePruning(sparsity=0.5, steps=60, over=over).find(runs)
    (pairs,) = runs.batches()
    own = runs.logits(pairs, pairs.clean)[0].detach()[:, -1].double().log_softmax(-1)
    if over == "heads":
        stand_ins = runs.stand_ins(pairs, "resample")

        def far(keep: np.ndarray) -> float:
            gates = torch.from_numpy(keep.astype(np.float32))
            out = gated_logits(runs, pairs, gates, stand_ins)[:, -1].double().log_softmax(-1)
            return float((own.exp() * (own - out)).sum(-1).mean())

        order = np.argsort(-found.score)
    else:
        stream = Stream(runs)
        sub = Subgraph(stream, Receivers(runs, stream), pairs, "resample")
        where = stream.graph.allowed

        def far(keep: np.ndarray) -> float:
            shut = np.zeros(where.shape, dtype=np.float32)
            shut[where] = 1 - keep
            out = sub.logits(torch.from_numpy(shut)[None], 0)[0][:, -1].double().log_softmax(-1)
            return float((own.exp() * (own - out)).sum(-1).mean())

        table = {(s, r, k): v for s, r, k, v in found.edges.itertuples(index=False)}
        names = [
            (stream.graph.senders[u], *stream.graph.receivers[v])
            for u, v in zip(*np.nonzero(where), strict=True)
        ]
        order = np.argsort([-table.get(name, 0.0) for name in names], kind="stable")
    count = len(order) // 2
    kept = np.isin(np.arange(len(order)), order[:count])
    draw = np.random.default_rng(0)
    others = [far(draw.permutation(kept)) for _ in range(20)]
    assert far(kept) <= np.quantile(others, 0.3)
    assert f"gates on {over}" in found.notes[0] and "drawn at random" in found.notes[0]


def test_the_same_seed_gives_the_same_gates() -> None:
    one, other = (EdgePruning(steps=5, over="heads").find(planted()).score for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_gates_on_heads_need_no_edges() -> None:
    found = EdgePruning(steps=2, over="heads").find(bench_of("gemma2", 2))
    assert found.score.shape == (8,) and found.edges is None


def test_settings_that_make_no_sense_are_refused() -> None:
    for make in (
        lambda: EdgePruning(sparsity=1.0),
        lambda: EdgePruning(over="neurons"),
        lambda: EdgePruning(steps=0),
        lambda: EdgePruning(rate=0.0),
        lambda: HeadGating(price=0.0),
        lambda: HeadGating(mode="median"),
        lambda: HeadGating(steps=0),
    ):
        with pytest.raises(InputError):
            make()
