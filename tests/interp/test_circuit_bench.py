"""The bench of circuit methods: what is shuffled and what is not, rankings that know nothing by
their definitions, and that a method which reads nothing of the task is told so."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from interp.circuits import (
    Bench,
    Truth,
    bench,
    constructed,
    controls,
    evaluate,
    measured,
    planted,
)
from interp.circuits.benching import bench as benches
from interp.circuits.benching.shuffling import shuffled
from interp.circuits.finding import find
from interp.circuits.judging.ranking import auc_of
from interp.circuits.methods.attribution import Attribution, first_order
from interp.circuits.methods.attribution_by_code import AttributionByCode
from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.methods.discrete_sae import DiscreteSAE
from interp.circuits.methods.head_ablation import HeadAblation
from interp.circuits.runs.optimal import optimal
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, from_task
from interp.errors import InputError, OutputError
from interp_hooks import Head


def prompts_of(worded: Any, n: int = 8, name: str = "llama") -> tuple[Any, Prompts]:
    model, _ = worded(name)
    return model, from_task(model, "ioi", n)


# --- what is shuffled
# ---------------------------------------------------------------------------------------------


def test_a_shuffle_moves_one_thing_and_everyone_gets_another_s(worded: Any) -> None:
    _, prompts = prompts_of(worded, 12)
    own = prompts.instances
    pairs = shuffled(prompts, "pairs", 3).instances
    labels = shuffled(prompts, "labels", 3).instances
    for i, p, la in zip(own, pairs, labels, strict=True):
        assert (p.ids, p.accept, p.wrong) == (i.ids, i.accept, i.wrong)
        assert (la.ids, la.corrupted) == (i.ids, i.corrupted)
        assert len(p.corrupted) == len(i.ids)
    assert sorted(p.corrupted for p in pairs) == sorted(i.corrupted for i in own)
    assert sorted(p.accept + p.wrong for p in labels) == sorted(i.accept + i.wrong for i in own)
    moved = sum(p.corrupted != i.corrupted for i, p in zip(own, pairs, strict=True))
    assert moved >= 11
    assert shuffled(prompts, "pairs", 3) == shuffled(prompts, "pairs", 3)
    assert shuffled(prompts, "pairs", 3) != shuffled(prompts, "pairs", 4)


def test_sides_change_places_in_half_of_the_pairs(worded: Any) -> None:
    _, prompts = prompts_of(worded, 10)
    swapped = 0
    for i, s in zip(prompts.instances, shuffled(prompts, "sides", 0).instances, strict=True):
        assert {s.ids, s.corrupted} == {i.ids, i.corrupted}
        swapped += s.ids != i.ids
    assert swapped == 5


def test_what_can_not_be_shuffled_is_told(worded: Any) -> None:
    _, prompts = prompts_of(worded, 4)
    alone = Prompts(prompts.task, prompts.instances[:1])
    with pytest.raises(InputError, match="Only 0 of 1 prompts"):
        shuffled(alone, "pairs", 0)
    with pytest.raises(InputError, match="labels, pairs, sides"):
        shuffled(prompts, "words", 0)


def test_each_method_s_control_takes_away_what_it_reads() -> None:
    assert Attribution().shuffles() == ("labels", "pairs")
    assert Attribution("mean").shuffles() == ("labels",)  # a mean does not know the pairs
    assert HeadAblation().shuffles() == ("labels",)
    assert DiscreteSAE().shuffles() == ("sides",)
    assert AttributionByCode().shuffles() == ("labels",)
    twin = AttributionByCode().twin()
    assert isinstance(twin, AttributionByCode) and twin.shuffled
    assert Attribution().twin() is None


def test_shuffled_pairs_change_nothing_where_a_mean_stands_in(worded: Any) -> None:
    model, prompts = prompts_of(worded, 6)
    one = first_order(PairedRuns(model, prompts), "mean", "")
    other = first_order(PairedRuns(model, shuffled(prompts, "pairs", 0)), "mean", "")
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


# --- rankings that know nothing
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_norms_and_attention_by_their_definitions(worded: Any, name: str) -> None:
    model, twin = worded(name)
    prompts = from_task(model, "ioi", 5)
    runs = PairedRuns(model, prompts)
    norm = controls.get("head_norm").make().find(runs).score
    weight = controls.get("attention_weight").make().find(runs).score
    norms = [[] for _ in runs.heads]
    looks = np.zeros(len(runs.heads))
    for i in prompts.instances:
        ids = torch.tensor([i.ids])
        patterns, _ = tiny.attentions(twin, input_ids=ids)
        changed = [k for k, (a, b) in enumerate(zip(i.ids, i.corrupted, strict=True)) if a != b]
        with model.activations("z") as kept, torch.no_grad():
            model.module(input_ids=ids, use_cache=False)
        for n, head in enumerate(runs.heads):
            row = patterns[head.layer][0, head.head, i.positions[-1]]
            looks[n] += float(row[changed].sum())
            W_O = model.head_weights(head.layer).W_O[head.head]
            z = kept["z", head.layer][0, :, head.head]
            norms[n] += (z @ W_O).norm(dim=-1).tolist()
    np.testing.assert_allclose(weight, looks / len(prompts), atol=1e-5)
    np.testing.assert_allclose(norm, [np.mean(n) for n in norms], rtol=1e-4)


def test_a_mean_size_is_the_mean_of_sizes(worded: Any) -> None:
    model, prompts = prompts_of(worded, 5)
    runs = PairedRuns(model, prompts)
    found = controls.get("mean_abs_effect").make().find(runs)
    np.testing.assert_allclose(found.score, np.abs(first_order(runs, "mean", "")).mean(1))
    one, other = (controls.get("random_ranking").make().find(PairedRuns(model, prompts, s)).score
                  for s in (1, 2))  # fmt: skip
    assert not np.allclose(one, other)


# --- the constant that a head is missed least by
# ------------------------------------------------------------------


@pytest.mark.slow
def test_an_optimal_constant_changes_answers_less_than_the_mean(worded: Any) -> None:
    """On the prompts that it was fitted on, head by head, by the divergence it minimises."""
    model, prompts = prompts_of(worded, 6)
    runs = PairedRuns(model, prompts)
    made, means = optimal(runs), runs.means()
    fitted_on = Prompts(prompts.task, prompts.instances[1::2])  # serves even prompts: made[·][0]
    check = PairedRuns(model, fitted_on)
    (pairs,) = check.batches()

    def answers(write: Any = None) -> list[torch.Tensor]:
        with torch.no_grad():
            logits, _ = check.logits(pairs, pairs.clean, write)
        return [rows.double().log_softmax(-1) for rows in pairs.judged(logits)]

    plain = answers()

    def divergence(head: Head, stand_in: torch.Tensor) -> float:
        from interp.circuits.runs.paired_runs import replacing

        other = answers(replacing([head], {head.layer: stand_in}))
        return float(sum((p.exp() * (p - o)).sum() for p, o in zip(plain, other, strict=True)))

    better = [
        divergence(h, made[h.layer][0]) <= divergence(h, means[h.layer]) + 1e-9 for h in runs.heads
    ]
    assert np.mean(better) > 0.9
    assert all(part.shape == (2, *means[layer].shape) for layer, part in made.items())


@pytest.mark.slow
def test_each_half_of_the_prompts_has_the_other_half_s_constant(worded: Any) -> None:
    model, prompts = prompts_of(worded, 4)
    runs = PairedRuns(model, prompts)
    (pairs,) = runs.batches()
    stand_in = runs.stand_ins(pairs, "optimal")[1]
    assert isinstance(stand_in, torch.Tensor) and runs._optimal is not None
    assert stand_in.shape[:2] == (4, 1)
    assert torch.equal(stand_in[:, 0], runs._optimal[1][[0, 1, 0, 1]])


# --- the whole
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blind(Method):
    """Reads nothing: always the same ranking."""

    name = "blind"
    title = "Blind"
    summary = ""
    reading = "Nothing."
    formula = "head number"
    citation = ""

    def find(self, runs: PairedRuns) -> Found:
        return Found(np.arange(len(runs.heads), dtype=float))


@dataclass(frozen=True)
class Reads(Method):
    """Knows the heads as long as pairs are the prompts' own."""

    pairs: frozenset[Any] = frozenset()

    name = "reads"
    title = "Reads"
    summary = ""
    reading = "The truth."
    formula = ""
    citation = ""

    def find(self, runs: PairedRuns) -> Found:
        own = {(i.ids, i.corrupted, i.accept) for i in runs.prompts.instances} <= self.pairs
        rng = np.random.default_rng(0)
        inside = np.array([h.head < 2 for h in runs.heads], dtype=float)
        return Found(inside if own else rng.random(len(runs.heads)))


@pytest.fixture(scope="module")
def result(pocket: Any) -> Bench:
    heads = {Head(layer, h): "x" for layer in range(4) for h in range(2)}
    truth = Truth("made", heads, 4, 8, "made for a test")
    own = {(i.ids, i.corrupted, i.accept) for i in from_task(pocket, "ioi", 12, 0).instances}
    methods = {"blind": Blind(), "reads": Reads(frozenset(own)), "attribution": "attribution"}
    return bench(pocket, "ioi", methods, [truth], n=12, draws=2)


def test_who_reads_the_prompts_beats_the_shuffle_and_who_does_not_is_told(result: Bench) -> None:
    frame = result.frame.set_index(["method", "control"])
    for kind in ("labels", "pairs"):
        blind, reads = frame.loc[("blind", kind)], frame.loc[("reads", kind)]
        assert blind.gain == 0 and not blind.beats
        assert reads.auc == 1 and reads.gain == pytest.approx(1 - reads.control_auc)
        assert reads.beats and reads.gain_low > 0
        assert ("blind", "made", kind) in result.beaten()
    assert not any(method == "reads" for method, _, _ in result.beaten())
    rows = {row[0]: row for row in result.table("made")}
    assert rows["blind"][4].count("not beaten") == 2 and "not beaten" not in rows["reads"][4]
    assert set(rows) == {"blind", "reads", "attribution", *controls.names()}


@dataclass(frozen=True)
class Picky(Attribution):
    """A method that the first shuffles leave nothing to explain."""

    refused: int = 1
    asked: list[int] = field(default_factory=list)

    def find(self, runs: PairedRuns) -> Found:
        self.asked.append(len(self.asked))
        if len(self.asked) <= self.refused:
            raise InputError("there is nothing to explain")
        return super().find(runs)


def test_a_shuffle_that_asks_for_nothing_is_drawn_anew(worded: Any) -> None:
    model, prompts = prompts_of(worded)
    once = Picky(refused=1)
    twins = benches._twins(model, prompts, once, 0, 2)
    assert {kind: len(found) for kind, found in twins.items()} == {"labels": 2, "pairs": 2}
    assert len(once.asked) == 5
    with pytest.raises(InputError, match="nothing to explain"):
        benches._twins(model, prompts, Picky(refused=99), 0, 2)


def test_a_bench_says_what_evaluate_says_and_survives_the_disk(
    result: Bench, pocket: Any, tmp_path: Path
) -> None:
    heads = {Head(layer, h): "x" for layer in range(4) for h in range(2)}
    truth = Truth("made", heads, 4, 8, "made for a test")
    wanted = evaluate(find(pocket, "ioi", "attribution", n=12), truth)
    row = result.frame[result.frame.method == "attribution"].iloc[0]
    assert row.auc == pytest.approx(wanted.auc) and row.auc_low == pytest.approx(wanted.auc_low)
    assert row.precision == pytest.approx(wanted.precision[8])
    again = Bench.load(result.save(tmp_path / "bench"))
    assert again.frame.equals(result.frame) and again.truths == result.truths
    assert "Against made" in again._repr_html_() and "not beaten" in again._repr_html_()
    (tmp_path / "bench" / "bench.parquet").write_bytes(b"x")
    with pytest.raises(OutputError, match="not the one"):
        Bench.load(tmp_path / "bench")
    with pytest.raises(OutputError, match="no bench"):
        Bench.load(tmp_path)


class Halting(Attribution):
    """Attribution that is interrupted at its first go."""

    runs = 0

    def find(self, runs: PairedRuns) -> Found:
        type(self).runs += 1
        if type(self).runs == 1:
            raise KeyboardInterrupt
        return super().find(runs)


def test_an_interrupted_bench_goes_on(pocket: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """What was finished is not run again, and the numbers are those of one go."""
    truth = Truth("made", {Head(2, 3): "x", Head(1, 0): "x"}, 4, 8, "made for a test")
    methods = {"one": Attribution(), "two": Halting()}
    searched: list[str] = []

    def counting(model: Any, prompts: Any, method: Method, **more: Any) -> Any:
        searched.append(type(method).__name__)
        return find(model, prompts, method, **more)

    monkeypatch.setattr(benches, "find", counting)

    def go(truth: Truth = truth, halt: bool = False) -> Bench | None:
        Halting.runs = 0 if halt else 1
        searched.clear()
        with contextlib.suppress(KeyboardInterrupt):
            return bench(
                pocket, "ioi", methods, [truth], n=8, draws=1, controls=["head_norm"],
                resume=tmp_path,
            )  # fmt: skip
        return None

    assert go(halt=True) is None and searched == ["Attribution", "Halting"]
    found = go()
    assert searched == ["Halting", "HeadNorm"] and not (tmp_path / "partial").exists()
    once = go()
    assert searched == ["Attribution", "Halting", "HeadNorm"]
    assert found is not None and once is not None
    columns = [c for c in once.frame if c != "seconds"]
    assert found.frame[columns].equals(once.frame[columns])
    # what is damaged, or was held against another truth, is run again
    go(halt=True)
    (kept,) = (tmp_path / "partial").glob("*.parquet")
    kept.write_bytes(kept.read_bytes()[:-1])
    go(halt=True)
    assert searched == ["Attribution", "Halting"]
    go(Truth("made", {Head(0, 0): "x"}, 4, 8, "made for a test"))
    assert searched == ["Attribution", "Halting", "HeadNorm"]


@pytest.mark.slow
def test_measured_truths_are_kept_too(tmp_path: Path, monkeypatch: Any) -> None:
    made, times = planted.get("induction"), []
    from interp.circuits.benching import truths

    def counting(*given: Any, **more: Any) -> Any:
        times.append(given[4])
        return measured(*given, **more)

    monkeypatch.setattr(truths, "measured", counting)
    for seed in (0, 0, 1):
        Halting.runs = seed % 2  # halts, then not
        with contextlib.suppress(KeyboardInterrupt):
            bench(
                made.model, made.task, {"it": Halting()}, ["zero"], n=8, seed=seed, draws=1,
                truth_prompts=16, controls=[], resume=tmp_path,
            )  # fmt: skip
    assert times == ["zero", "zero"]  # of seed 0 once


@pytest.mark.slow
def test_truths_are_measured_as_they_are_named() -> None:
    made = planted.get("induction")
    found = bench(
        made.model, made.task, ["attribution"], ["zero", made.truth], n=16, draws=1,
        truth_prompts=32, controls=["random_ranking"],
    )  # fmt: skip
    assert list(found.truths) == ["zero", made.truth.name]
    assert "exhaustive zero ablation, 32 prompts" in found.truths["zero"]
    own = found.frame[(found.frame.method == "attribution") & (found.frame.truth != "zero")]
    assert (own.auc == 1).all()
    assert auc_of(np.arange(3.0), np.array([False, True, True])) == 1


@pytest.mark.slow
def test_pairs_and_paths_are_not_held_against_edges() -> None:
    """What a discrete SAE or path patching lists are no edges of the graph: only heads are judged;
    EAP's are."""
    made = constructed.get("negative")
    methods = {
        "codes": DiscreteSAE(trials=1, steps=5),
        "paths": "path_patching",
        "edges": "eap",
    }
    found = bench(made.model, made.task, methods, [made.truth], n=8, draws=1, controls=[]).frame
    ranked = found.groupby("method")["ranked"].unique().map(set).to_dict()
    assert ranked == {"codes": {"heads"}, "paths": {"heads"}, "edges": {"heads", "edges"}}


def test_what_a_bench_refuses(pocket: Any) -> None:
    with pytest.raises(InputError, match="measured by zero, mean, resample, optimal"):
        bench(pocket, "ioi", ["attribution"], ["median"], n=4)
    with pytest.raises(InputError, match="at least once"):
        bench(pocket, "ioi", ["attribution"], [], n=4, draws=0)
