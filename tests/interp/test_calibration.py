"""Calibration: planted truths, the split, the guard, resuming, gradients through gates, and bad
input."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_planted import planted

import interp
from interp import calibration
from interp.calibration.act_head_filter import HeadFilter, filter_heads, judge_heads, too_few
from interp.calibration.gates import GateTraining, binarised, ramp
from interp.calibration.guard import adjusted, sign_test
from interp.calibration.headhunter import HeadHunter
from interp.calibration.splits import Bench, Outcome, split
from interp.calibration.zerotuning import best_gamma
from interp.edits import ACT, Gate, ScaleHeads, ZeroTuning
from interp.errors import InputError, OutputError, UnknownNameError
from interp.evaluation.accuracy import judge, sample
from interp.inputs.tokenizer import Text
from interp.support.checkpoints import Checkpoints
from interp.tasks.classification import Classification
from interp.tasks.niah import NeedleInAHaystack
from interp.tasks.task import Instance, Problem
from interp_hooks import Head, HookedModel, hook

SHORT = Classification(shots=1)
NEEDLE = NeedleInAHaystack((96,), (0.2, 0.6), words=2)


@pytest.fixture(scope="module")
def pocket() -> HookedModel:
    return interp.load("pocket-llama")


@pytest.fixture(scope="module")
def small(worded: Callable[[str], Any]) -> HookedModel:
    return worded("llama")[0]


@dataclass
class Interrupted:
    """A progress report that stops the work after so many reports, as Ctrl-C would."""

    after: int

    def __call__(self, done: int, total: int, what: str) -> None:
        assert 0 <= done <= total and what
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt


def test_sign_test_and_adjustment_are_scipys() -> None:
    from scipy.stats import binomtest, false_discovery_control

    for better, worse, same in ((5, 0, 3), (7, 2, 0), (3, 8, 5), (0, 0, 4), (1, 1, 1)):
        expected = (
            binomtest(better, better + worse, alternative="greater").pvalue
            if better + worse
            else 1.0
        )
        assert sign_test([0.5] * better + [-1.0] * worse + [0.0] * same) == pytest.approx(expected)
    p = np.random.default_rng(0).random(40) ** 3
    np.testing.assert_allclose(adjusted(p), false_discovery_control(p))
    assert len(adjusted([])) == 0


def moved(rng: np.random.Generator, margin: np.ndarray, mean: float) -> Outcome:
    """Margins move by noise of this mean; an answer is right where its margin is positive."""
    margin = margin + rng.normal(mean, 0.5, len(margin))
    return Outcome((margin > 0).astype(float), margin, np.zeros(len(margin)))


def test_the_guard_keeps_the_planted_heads_and_no_guard_keeps_many_more() -> None:
    rng = np.random.default_rng(1)
    n, heads = 40, [Head(layer, h) for layer in range(8) for h in range(12)]
    true = set(heads[5:96:12])
    before = moved(rng, rng.normal(0, 1, n), 0.0)
    found = [moved(rng, before.margin, 0.6 if h in true else 0.0) for h in heads]
    guarded, bare = (judge_heads(before, heads, found, guard, 0.05) for guard in ("bh", "none"))  # type: ignore[arg-type]
    kept = {h for h, k in zip(heads, guarded.kept, strict=True) if k}
    assert true <= kept and len(kept - true) <= 1
    assert bare.kept.sum() > 3 * len(true)
    assert (guarded.q >= guarded.p).all() and (guarded.better + guarded.worse == n).all()


def test_too_few_instances_for_the_guard_are_told() -> None:
    """The note is true: with as many unanimous heads as it says some are kept, with one fewer or n
    smaller none is."""

    def kept(n: int, heads: int, unanimous: int) -> int:
        before = Outcome(np.zeros(n), np.zeros(n), np.zeros(n))
        better = Outcome(np.zeros(n), np.ones(n), np.zeros(n))
        found = [better] * unanimous + [before] * (heads - unanimous)
        named = [Head(0, h) for h in range(heads)]
        return int(judge_heads(before, named, found, "bh", 0.05).kept.sum())

    said = too_few(8, 32, 0.05)
    assert (
        said is not None
        and "0.0078 at best" in said
        and "at least 5 heads" in said
        and said.endswith("use n ≥ 11.")
    )
    assert kept(8, 32, 5) == 5 and kept(8, 32, 4) == 0
    assert (
        kept(11, 32, 1) == 1
        and kept(10, 32, 1) == 0
        and too_few(11, 32, 0.05) is None
        and too_few(10, 32, 0.05)
    )
    assert "whatever they do" in str(too_few(8, 2, 0.001)) and too_few(8, 0, 0.05) is None


def test_the_split_is_disjoint_and_seeded(small: HookedModel) -> None:
    parts = split(small, SHORT, 20, 30, 0)
    prompts = {i.prompt for i in parts.train}
    assert (
        len(parts.train) == 20
        and len(parts.heldout) == len({i.prompt for i in parts.heldout}) == 30
    )
    assert not prompts & {i.prompt for i in parts.heldout}
    again = split(small, SHORT, 20, 30, 0)
    assert [i.ids for i in again.heldout] == [i.ids for i in parts.heldout]
    assert [i.ids for i in split(small, SHORT, 20, 30, 1).train] != [i.ids for i in parts.train]


@dataclass(frozen=True)
class Few(Classification):
    """Only `kinds` different problems, whatever the seed."""

    kinds: int = 24

    def sample(self, tokenizer: Any, n: int, seed: int = 0) -> list[Instance]:
        all_of_them = Classification(0).sample(tokenizer, self.kinds, 0)
        return [
            all_of_them[i] for i in np.random.default_rng([seed, n]).permutation(self.kinds)[:n]
        ]


def test_instances_of_both_samples_are_left_out_of_the_held_out_ones(small: HookedModel) -> None:
    parts = split(small, Few(), 10, 8, 0)
    assert not {i.prompt for i in parts.train} & {i.prompt for i in parts.heldout}
    with pytest.raises(InputError, match="has only 8 instances beside the 16"):
        split(small, Few(), 16, 12, 0)


@dataclass(frozen=True)
class OneClass(Classification):
    """All answers are positive."""

    def compose(self, text: Text, rng: np.random.Generator) -> Problem:
        while (problem := super().compose(text, rng)).answer != " positive":
            pass
        return problem


def test_bad_input_is_told_in_one_sentence(small: HookedModel, tmp_path: Path) -> None:
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (UnknownNameError, "did you mean act", dict(method="actt")),
        (UnknownNameError, "task", dict(task="classificaton")),
        (InputError, "has no setting 'gama'", dict(gama=2)),
        (InputError, "has its settings already", dict(method=HeadFilter(), beta=0.2)),
        (InputError, "n ≥ 8", dict(n=7)),
        (InputError, "n ≥ 8", dict(heldout=2)),
        (InputError, "0 or more", dict(seed=-1)),
        (InputError, "the same answer", dict(task=OneClass(0))),
        (InputError, "layer 9", dict(layers=[9])),
        (InputError, "guard", dict(guard="bonferroni")),
        (InputError, "level", dict(level=0.0)),
        (interp.InterpError, "β", dict(beta=2.0)),
        (InputError, "γs", dict(method="zerotuning", grid=(0.0, 1.0))),
        (InputError, "headhunter can", dict(method="headhunter", using="remove")),
        (InputError, "sparsity", dict(method="gates", sparsity=1.5)),
        (InputError, "sees all", dict(method="gates", task=NEEDLE, recent=200)),
        (OutputError, "it is a folder", dict(out=tmp_path)),
    ]
    for error, words, settings in cases:
        with pytest.raises(error, match=words) as caught:
            interp.calibrate(small, **(dict(method="act", task=SHORT, n=8) | settings))
        assert "\n" not in str(caught.value)
    assert small.observers_and_edits() == ([], []) and not list(tmp_path.iterdir())


def test_the_filter_finds_the_head_that_was_damaged(pocket: HookedModel) -> None:
    """One head's output is turned round in the weights; turning it back, head by head, helps there
    and only there."""
    head, d = Head(1, 7), pocket.d_head
    module = copy.deepcopy(pocket.module)
    with torch.no_grad():
        module.model.layers[1].self_attn.o_proj.weight[:, head.head * d : (head.head + 1) * d] *= -1
    damaged = hook(module, name="damaged", tokenizer=pocket.tokenizer)
    bench = Bench(damaged, split(damaged, "colored_objects", 12, 8, 0), 0, Checkpoints(None, {}))
    heads = [h for h in damaged.heads if h.layer == 1]
    kept, trials = filter_heads(bench, heads, lambda h: [ScaleHeads({h: -1.0})], "bh", 0.05)
    assert kept == [head]
    row = trials.set_index("head").loc[7]
    assert row.accuracy == 1 and row.accuracy_change > 0.2 and row.q < 0.01 and row.worse == 0


def test_headhunter_finds_the_planted_circuit(tokenizer: Any) -> None:
    """The heads without which induction fails are the two planted ones; a second round brings
    nothing."""
    model = hook(planted(len(tokenizer)), name="planted", tokenizer=tokenizer)
    posed, instances = sample(model, "induction", 2, 0)
    task = posed.task

    def harm(hooked: HookedModel, edits: Any) -> float:
        return -float(np.mean([correct for correct, _ in judge(hooked, task, instances, edits)]))

    bench = Bench(model, split(model, "induction", 8, 8, 0), 0, Checkpoints(None, {}))
    found = HeadHunter("ablate", harm, rounds=2, top=2).find(bench)
    assert found.edits[0].heads == (Head(0, 1), Head(1, 2))  # type: ignore[attr-defined]
    assert found.trials.groupby("round").size().tolist() == [8, 6]
    assert found.trials[found.trials.kept].change.min() > 0.8


def test_headhunter_takes_the_top_of_a_round(small: HookedModel) -> None:
    """An additive objective: the best heads join in order, those that lower it never do."""
    worth = {h: 1.0 - 0.3 * i for i, h in enumerate(small.heads)}

    def total(model: HookedModel, edits: Any) -> float:
        return sum(worth[h] for e in edits for h in e.heads)

    found = interp.calibrate(
        small, "headhunter", SHORT, n=8, objective=total, rounds=5, top=2, shortlist=5
    )
    assert found.edits[0].heads == tuple(small.heads[:4])  # type: ignore[attr-defined]
    assert found.trials.groupby("round").size().tolist() == [8, 5, 3]
    nothing = interp.calibrate(small, "headhunter", SHORT, n=8, objective=lambda m, e: -len(e))
    assert nothing.edits == [] and "nothing to edit" in nothing.notes[0]
    with pytest.raises(InputError, match="finite"):
        interp.calibrate(small, "headhunter", SHORT, n=8, objective=lambda m, e: float("nan"))


def test_act_head_filter_end_to_end(pocket: HookedModel, tmp_path: Path) -> None:
    out = tmp_path / "act.json"
    found = interp.calibrate(pocket, "act", SHORT, n=12, layers=[1], guard="none", out=out)
    (edit,) = found.edits
    assert isinstance(edit, ACT) and edit.heads == tuple(
        Head(int(r.layer), int(r["head"])) for _, r in found.trials[found.trials.kept].iterrows()
    )
    assert len(found.trials) <= 8 and not (tmp_path / "act.resume").exists()
    assert interp.edits.load(out) == [edit]
    result = interp.evaluate(pocket, SHORT, interp.edits.load(out), n=8)
    assert result.edited is not None
    record = json.loads((tmp_path / "act.calibration.json").read_text())
    assert record["heldout"]["accuracy"]["difference"]["n"] == 12
    assert (
        record["provenance"]["settings"]["act.guard"] == "none"
        and record["provenance"]["weights_hash"]
    )
    import pandas as pd

    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "act.trials.parquet"), found.trials)


def test_act_skips_heads_without_sinks(pocket: HookedModel) -> None:
    """No mean is above a threshold near 1: nothing to try, nothing to edit, and a note."""
    found = interp.calibrate(pocket, HeadFilter(threshold=0.999), SHORT, n=8)
    assert (
        found.edits == [ACT(threshold=0.999, heads=())]
        and not len(found.trials)
        and len(found.notes) == 2
    )
    assert found.heldout.accuracy.difference.low == found.heldout.accuracy.difference.high == 0


def test_unsupervised_zerotuning_lowers_the_entropy_and_reads_no_label(pocket: HookedModel) -> None:
    found = interp.calibrate(
        pocket, "zerotuning", OneClass(1), n=8, unsupervised=True, grid=(0.25, 0.5, 2.0, 4.0)
    )
    (edit,) = found.edits
    assert isinstance(edit, ZeroTuning) and {"accuracy", "margin"}.isdisjoint(found.trials.columns)
    search = found.trials[found.trials.stage == "search"]
    assert edit.gamma == search.loc[search.entropy.idxmin(), "gamma"] != 1
    assert found.train.entropy.difference.mean < 0
    profile = found.trials[found.trials.stage == "profile"]
    untouched = found.train.entropy.baseline.mean
    assert ((profile.entropy < untouched) == (profile.effect == "up")).all()
    indices = {h.head for h in edit.heads or ()}
    sizes = profile.effect.value_counts()
    assert len(indices) == sizes.max() and {h.layer for h in edit.heads or ()} == set(range(4))


def test_of_gammas_that_tie_the_nearest_to_one_is_taken() -> None:
    assert (
        best_gamma({0.5: (0.5, 1.0), 1.0: (0.5, 1.0), 2.0: (0.5, 1.0 + 1e-7), 4.0: (0.5, 1.0)}) == 1
    )
    assert best_gamma({0.1: (0.9, 2.0), 1.0: (0.5, 3.0), 2.0: (0.9, 2.0), 4.0: (0.9, 1.0)}) == 2
    assert best_gamma({1.0: (0.5, 1.0), 2.0: (0.5, 1.1), 4.0: (0.5, 1.2)}) == 4


def test_supervised_zerotuning_takes_the_best_gamma(pocket: HookedModel) -> None:
    found = interp.calibrate(pocket, "zerotuning", SHORT, n=10, grid=(0.2, 5.0), profile=False)
    search = found.trials.sort_values(["accuracy", "margin"])
    assert search.gamma.tolist()[-1] == found.edits[0].gamma and sorted(search.gamma) == [
        0.2,
        1.0,
        5.0,
    ]  # type: ignore[attr-defined]
    assert found.train.accuracy.difference.mean >= 0


def test_nothing_is_measured_under_outer_edits(pocket: HookedModel) -> None:
    settings = dict(n=8, grid=(2.0,), profile=False)
    plain = interp.calibrate(pocket, "zerotuning", SHORT, **settings)
    with pocket.edit(ScaleHeads({"0.0": 0.0})):
        inside = interp.calibrate(pocket, "zerotuning", SHORT, **settings)
    assert inside.train == plain.train and inside.trials.equals(plain.trials)


@pytest.mark.parametrize("distance", ["hidden", "kl"])
def test_the_gates_gradient_is_the_finite_difference(
    tiny_model: Any, tokenizer: Any, distance: str
) -> None:
    model = hook(
        tiny_model("gpt2", len(tokenizer)).double(), name="gpt2", tokenizer=tokenizer
    )  # float64 throughout
    instances = NEEDLE.sample(tokenizer, 2)
    method = GateTraining(sink=2, recent=8, distance=distance)  # type: ignore[arg-type]
    alpha = torch.full((2, 4), 0.6, dtype=torch.float64, requires_grad=True)
    method.difference(model, instances, alpha).backward()
    assert alpha.grad is not None and float(alpha.grad.abs().min()) > 1e-9
    for place in ((0, 0), (0, 3), (1, 1)):
        sides = []
        for step in (1e-5, -1e-5):
            moved = alpha.detach().clone()
            moved[place] += step
            sides.append(method.difference(model, instances, moved).item())
        assert alpha.grad[place].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6)


def test_gates_learn_and_resume(small: HookedModel, tmp_path: Path) -> None:
    """Without a penalty gates have nothing to gain by closing; with it they close, and the loss
    falls."""
    method = GateTraining(steps=5, sink=2, recent=8, penalty=0.5)
    whole = interp.calibrate(small, method, NEEDLE, n=8, force=True, out=tmp_path / "whole.json")
    assert isinstance(whole.edits[0], Gate) and whole.trace is not None and len(whole.trace) == 5
    assert (
        whole.trace.loss.iloc[-1] < whole.trace.loss.iloc[0]
        and whole.trials.alpha.between(0, 0.9999).all()
    )
    assert sorted(whole.trials.gate) == [0, 0, 1, 1]
    assert all(p.requires_grad for p in small.module.parameters())
    (loaded,) = interp.edits.load(tmp_path / "whole.json")
    assert loaded == whole.edits[0] and (tmp_path / "whole.trace.parquet").is_file()
    out = tmp_path / "parts.json"
    with pytest.raises(KeyboardInterrupt):
        interp.calibrate(small, method, NEEDLE, n=8, force=True, out=out, progress=Interrupted(4))
    assert 0 < len(list((tmp_path / "parts.resume" / "partial").glob("step-*"))) < 5
    parts = interp.calibrate(small, method, NEEDLE, n=8, force=True, out=out)
    assert (
        parts.trials.equals(whole.trials)
        and parts.trace is not None
        and parts.trace.equals(whole.trace)
    )
    kept = interp.calibrate(
        small,
        GateTraining(steps=1, sink=2, recent=8, penalty=0.0, sparsity=None),
        NEEDLE,
        n=8,
        force=True,
    )
    assert (kept.trials.alpha == 1).all() and (kept.trials.gate == kept.trials.alpha).all()


def test_ramp_and_quantile() -> None:
    rates = [ramp(i, 20) for i in range(20)]
    assert (
        rates[0] == 0.25
        and max(rates) == rates[3] == rates[16] == 1
        and rates[-1] == 0.25
        and min(rates) > 0.1
    )
    assert ramp(0, 2000) == 0.1
    alpha = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    assert binarised(alpha, 0.5).tolist() == [[1, 0], [0, 1]]
    assert binarised(alpha, 0.0).sum() == 4 and binarised(alpha, 1.0).sum() == 0


def test_methods_say_what_they_are() -> None:
    assert calibration.names() == ["act", "zerotuning", "headhunter", "gates"]
    for name in calibration.names():
        kind = calibration.registry.get(name)
        assert kind.name == name and kind.summary and "arXiv" in kind.citation and kind.__doc__
