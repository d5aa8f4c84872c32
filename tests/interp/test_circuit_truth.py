"""Known circuits and how rankings are scored against them: every number against its definition,
written anew."""

from __future__ import annotations

import json
import math
from itertools import combinations, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.circuits.judging.agreement import evaluate, precision_at, ranks
from interp.circuits.judging.areas import curve_areas
from interp.circuits.judging.ranking import (
    auc_of,
    auc_over_prompts,
    difference,
    hanley_mcneil,
    roc,
)
from interp.circuits.judging.stability import Stability, jaccard, stability
from interp.circuits.known.truth import Truth, published, published_names
from interp.errors import HeadError, InputError, OutputError, UnknownNameError
from interp_hooks import Head


@pytest.mark.parametrize(
    ("task", "model", "size", "positives"),
    [
        ("ioi", "gpt2", (12, 12), 26),
        ("greater_than", "gpt2", (12, 12), 9),
        ("induction", "gpt2", (12, 12), 5),
        ("docstring", "attn-only-4l", (4, 8), 6),
        ("docstring_sae_circuits", "attn-only-4l", (4, 8), 6),
    ],
)
def test_published_circuits_have_their_published_sizes(
    task: str, model: str, size: tuple[int, int], positives: int
) -> None:
    truth = published(task, model)
    assert truth.complete and truth.source and truth.model == model
    assert truth.matrix().shape == size and truth.matrix().sum() == positives == len(truth.heads)
    assert published(task).heads == truth.heads  # the only model, or gpt2


def test_ioi_classes() -> None:
    found = {kind: len(heads) for kind, heads in published("ioi").classes().items()}
    assert found == {
        "name mover": 3,
        "backup name mover": 8,
        "negative name mover": 2,
        "S-inhibition": 4,
        "induction": 4,
        "duplicate token": 3,
        "previous token": 2,
    }
    assert published("ioi").heads[Head(9, 9)] == "name mover"
    assert not published("ioi").matrix()[9, 8]


def test_the_two_docstring_lists_differ_in_one_head() -> None:
    one, other = published("docstring"), published("docstring_sae_circuits")
    assert set(one.heads) ^ set(other.heads) == {Head(1, 2), Head(1, 0)}
    assert any("differ" in note for note in one.notes) and set(one.notes) & set(other.notes)


def test_retrieval_lists_are_marked_as_incomplete() -> None:
    models = [m for task, m in published_names() if task == "retrieval"]
    assert len(models) == 5
    for model in models:
        truth = published("retrieval", model)
        assert not truth.complete and set(truth.effects) == set(truth.heads)
        values = list(truth.effects.values())
        assert values == sorted(values, reverse=True) and 0.5 < values[-1] <= values[0] <= 1
    assert published("retrieval", "llama-2-7b-80k").effects[Head(16, 19)] == 0.94
    assert published("retrieval", "qwen1.5-14b").matrix().shape == (40, 40)


def test_every_published_name_is_found() -> None:
    for task, model in published_names():
        assert published(task, model).name == task


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("iot",), "ioi"),
        (("ioi", "gpt3"), "gpt2"),
        (("retrieval",), "llama-2-7b-80k"),
        (("no such thing at all",), "greater_than"),
    ],
)
def test_unknown_names_come_with_close_ones(asked: tuple[str, ...], said: str) -> None:
    with pytest.raises(UnknownNameError, match=said):
        published(*asked)


def small(**changes: Any) -> Truth:
    given: dict[str, Any] = dict(
        name="toy",
        heads={Head(0, 1): "first", Head(1, 0): "second", Head(1, 2): "second"},
        n_layers=2,
        n_heads=3,
        source="a test",
        model="tiny",
        effects={Head(0, 1): 0.25},
        edges=((Head(0, 1), Head(1, 0), "q"),),
        notes=("ä note",),
        complete=False,
    )
    return Truth(**{**given, **changes})


def test_truth_survives_the_disk(tmp_path: Path) -> None:
    truth = small()
    assert Truth.load(truth.save(tmp_path / "deep" / "truth.json")) == truth
    assert truth.classes() == {"first": [Head(0, 1)], "second": [Head(1, 0), Head(1, 2)]}
    assert np.array_equal(truth.matrix(), [[False, True, False], [True, False, True]])
    assert "3 of 6" in repr(truth) and "strongest" in repr(truth)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "format": 99}),
        lambda text: json.dumps({**json.loads(text), "heads": {"L9H9": "too far"}}),
        lambda text: json.dumps({**json.loads(text), "heads": ["L0H1"]}),
        lambda text: json.dumps({**json.loads(text), "edges": [["L0H1", "L1H0", "z"]]}),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "source"}),
        lambda text: json.dumps({**json.loads(text), "n_layers": "two"}),
        lambda text: json.dumps({**json.loads(text), "complete": "no"}),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Any) -> None:
    path = small().save(tmp_path / "truth.json")
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(OutputError, match="again"):
        Truth.load(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such file"):
        Truth.load(tmp_path / "none.json")


def test_impossible_truths_are_refused() -> None:
    with pytest.raises(HeadError):
        small(heads={Head(2, 0): "x"})
    with pytest.raises(InputError, match="tower"):
        small(heads={Head(1, 0, "vision"): "x"})
    with pytest.raises(InputError, match="q, k or v"):
        small(edges=((Head(0, 1), Head(1, 0), "z"),))
    with pytest.raises(InputError, match="layers"):
        small(heads={}, n_layers=0)


# --- scores against definitions
# ---------------------------------------------------------------------------------------


def by_hand(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """AUCs by counting pairs, average precision by walking down the thresholds."""
    positive, negative = scores[labels], scores[~labels]
    wins = sum(float(p > q) for p in positive for q in negative)
    ties = sum(float(p == q) for p in positive for q in negative)
    pairs = len(positive) * len(negative)
    precision_sum, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        now = labels[chosen].sum() / labels.sum()
        precision_sum += (now - recall) * labels[chosen].mean()
        recall = now
    return dict(
        auc=(wins + ties / 2) / pairs, auc_pessimistic=wins / pairs, average_precision=precision_sum
    )


@st.composite
def problems(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """(layers, heads) scores with many ties, and labels with both classes."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda s: s[0] * s[1] > 1))
    n = shape[0] * shape[1]
    scores = draw(
        st.lists(st.sampled_from([-1.5, 0.0, 0.25, 1.0, 3.0, 1e9]), min_size=n, max_size=n)
    )
    labels = draw(
        st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda x: 0 < sum(x) < len(x))
    )
    return np.array(scores).reshape(shape), np.array(labels).reshape(shape)


def truth_of(labels: np.ndarray) -> Truth:
    heads = {Head(int(layer), int(head)): "in" for layer, head in np.argwhere(labels)}
    return Truth("drawn", heads, *labels.shape, "a test")


@settings(max_examples=60, deadline=None)
@given(problems())
def test_areas_and_average_precision(problem: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = problem
    found = evaluate(scores, truth_of(labels))
    for name, value in by_hand(scores.ravel(), labels.ravel()).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-12), name
    u = scipy.stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
    assert found.auc == pytest.approx(u / (labels.sum() * (~labels).sum()), abs=1e-12)
    assert found.chance == pytest.approx(labels.mean()) and found.n_positive == labels.sum()
    assert found.n_heads == labels.size and 0 < found.p <= 1


def test_the_same_as_sklearn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.integers(0, 6, (4, 8)).astype(float), rng.random((4, 8)) < 0.3
        labels[0, :2] = True, False
        found = evaluate(scores, truth_of(labels))
        assert found.auc == pytest.approx(
            metrics.roc_auc_score(labels.ravel(), scores.ravel()), abs=1e-12
        )
        expected = metrics.average_precision_score(labels.ravel(), scores.ravel())
        assert found.average_precision == pytest.approx(expected, abs=1e-12)
        fpr, tpr, thresholds = metrics.roc_curve(
            labels.ravel(), scores.ravel(), drop_intermediate=False
        )
        for ours, theirs in zip(roc(scores, labels), (fpr, tpr, thresholds), strict=True):
            np.testing.assert_allclose(ours, theirs)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=2, max_size=5), st.data())
def test_precision_at_k_is_the_mean_over_all_orders_of_ties(scores: list[float], data: Any) -> None:
    n = len(scores)
    some = st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda x: 0 < sum(x) < n)
    labels = np.array(data.draw(some))
    values = np.array(scores)
    found = evaluate(values[None], truth_of(labels[None]))
    assert sorted(found.precision) == [
        k for k in sorted({1, 3, 5, 10, int(labels.sum())}) if k <= n
    ]
    for k in found.precision:
        hits = []
        for order in permutations(range(n)):
            ranking = sorted(order, key=lambda i: -values[i])  # stable: ties stay in this order
            hits.append(labels[ranking[:k]].sum())
        assert found.precision[k] == pytest.approx(np.mean(hits) / k, abs=1e-12)
        assert found.recall[k] == pytest.approx(np.mean(hits) / labels.sum(), abs=1e-12)
        assert precision_at(values[None], truth_of(labels[None]), k) == pytest.approx(
            found.precision[k]
        )


def test_a_ranking_by_hand() -> None:
    """4 3 | 2 2 | 1 with + − (+ −) −: of 6 pairs 4 are won and one is tied."""
    found = evaluate(np.array([[4.0, 3.0, 2.0, 2.0, 1.0]]), "0.0,0.2")
    assert found.auc == pytest.approx(4.5 / 6) and found.auc_pessimistic == pytest.approx(4 / 6)
    assert found.average_precision == pytest.approx(0.5 * 1 + 0.5 * 0.5)
    assert found.precision == pytest.approx({1: 1.0, 2: 0.5, 3: 0.5, 5: 0.4})
    assert found.recall == pytest.approx({1: 0.5, 2: 0.5, 3: 0.75, 5: 1.0})
    assert ranks(np.array([[4.0, 3.0, 2.0, 2.0, 1.0]]), "0.2,0.0") == {
        Head(0, 2): 3.5,
        Head(0, 0): 1.0,
    }
    frame = found.to_frame()
    assert len(frame) == 1 and frame.auc[0] == found.auc and frame.precision_at_3[0] == 0.5
    assert "AUC 0.750" in repr(found) and "2 of 5" in repr(found)


def test_constant_scores_are_chance() -> None:
    truth = published("ioi")
    found = evaluate(np.zeros((12, 12)), truth)
    assert found.auc == 0.5 and found.auc_pessimistic == 0.0 and found.p == 1.0
    assert found.average_precision == pytest.approx(26 / 144) == pytest.approx(found.chance)
    assert set(np.round(list(found.precision.values()), 12)) == {round(26 / 144, 12)}


def test_a_perfect_ranking_and_its_opposite() -> None:
    truth = published("ioi")
    best = evaluate(truth.matrix().astype(float), truth)
    assert (
        best.auc == best.auc_pessimistic == best.average_precision == 1 and best.precision[26] == 1
    )
    assert best.p == pytest.approx(1 / 2001)
    worst = evaluate(-truth.matrix().astype(float), truth)
    assert worst.auc == 0 and worst.precision[1] == 0 and worst.p == 1.0


def test_p_is_the_share_of_circuits_ranked_as_high() -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 4, 9).astype(float)
    labels = np.zeros(9, dtype=bool)
    labels[np.argsort(-scores)[[0, 2, 4]]] = True
    mine = by_hand(scores, labels)["auc"]
    areas = [
        by_hand(scores, np.isin(np.arange(9), chosen))["auc"]
        for chosen in combinations(range(9), 3)
    ]
    exact = np.mean([a >= mine - 1e-12 for a in areas])
    assert 0.02 < exact < 0.98
    found = evaluate(scores.reshape(3, 3), truth_of(labels.reshape(3, 3)), seed=3)
    assert found.p == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 2000))
    assert found == evaluate(scores.reshape(3, 3), truth_of(labels.reshape(3, 3)), seed=3)


def test_the_roc_starts_at_the_origin_and_ends_in_the_corner() -> None:
    fpr, tpr, thresholds = roc([0.5, 0.5, 2.0, -1.0], [True, False, True, False])
    np.testing.assert_allclose(fpr, [0, 0, 0.5, 1])
    np.testing.assert_allclose(tpr, [0, 0.5, 1, 1])
    np.testing.assert_allclose(thresholds, [np.inf, 2.0, 0.5, -1.0])


# --- forms of scores and truths
# ---------------------------------------------------------------------------------------


def test_all_forms_of_scores_agree() -> None:
    truth = published("docstring")
    scores = np.random.default_rng(0).random((4, 8))
    places = [(layer, head) for layer in range(4) for head in range(8)]
    frame = pd.DataFrame([dict(layer=a, head=b, score=scores[a, b]) for a, b in reversed(places)])
    more = frame.assign(other=0.0, tower="text")
    forms: list[tuple[Any, str | None]] = [
        (scores, None),
        (np.ma.masked_invalid(scores), None),
        ({f"L{a}H{b}": scores[a, b] for a, b in places}, None),
        ({Head(a, b, "text"): scores[a, b] for a, b in places}, None),
        (frame, None),
        (more, "score"),
        (SimpleNamespace(frame=more, column="score"), None),
        (SimpleNamespace(frame=more, column="other"), "score"),
    ]
    expected = evaluate(scores, truth)
    for form, column in forms:
        assert evaluate(form, truth, column=column) == expected
    assert evaluate(scores, "docstring") == expected
    given = evaluate(scores, ["0.5", (1, 2), Head(1, 4), "L2H0", "a3.h0", "3-6"])
    assert given.auc == expected.auc and given.precision == expected.precision
    assert evaluate(scores, "0.5,1.2,1.4,2.0,3.0,3.6").auc == expected.auc


def test_heads_without_layers_between_are_ranked_among_those_scored() -> None:
    """A hybrid model: layer 1 has no attention."""
    found = evaluate({"0.0": 1.0, "0.1": 3.0, "2.0": 2.0, "2.1": 0.0}, ["0.1"])
    assert found.n_heads == 4 and found.auc == 1


@pytest.mark.parametrize(
    ("scores", "truth", "said"),
    [
        (np.zeros((12, 11)), "ioi", "12 layers × 11 heads"),
        (np.zeros((13, 12)), "ioi", "13 layers"),
        (np.where(np.eye(12) > 0, np.nan, 0.0), "ioi", r"L0H0, L1H1.* and 2 more have NaN"),
        (np.ma.masked_less(np.arange(144.0).reshape(12, 12), 1), "ioi", "L0H0 have NaN"),
        (
            {(a, b): 0.0 for a in range(12) for b in range(12) if (a, b) != (3, 4)},
            "ioi",
            "L3H4 have no score",
        ),
        ({"0.0": 1.0, "0.1": 2.0}, ["0.0", "1.1"], "L1H1 are in the circuit"),
        (np.zeros((2, 2)), [], "No heads are in the circuit"),
        (np.zeros((1, 2)), ["0.0", "0.1"], "All heads are in the circuit"),
        (np.zeros(4), ["0.0"], "layers, heads"),
        ("scores", ["0.0"], "dict"),
        ({}, ["0.0"], "no scores"),
        ({"0.0": "much", "0.1": 1.0}, ["0.0"], "not a number"),
        ({"0.0": 1.0, "L0H0": 1.0, "0.1": 2}, ["0.0"], "two scores"),
        ({"text.L0H0": 1.0, "vision.L0H0": 1.0}, ["0.0"], "text and vision"),
        (pd.DataFrame(dict(layer=[0], head=[0])), ["0.0"], "one column"),
        (pd.DataFrame(dict(layer=[0], head=[0], a=[1.0], b=[2.0])), ["0.0"], "column="),
        (pd.DataFrame(dict(layer=[0], a=[1.0])), ["0.0"], "no column 'head'"),
        (np.zeros((32, 32)), published("retrieval", "yi-6b-200k"), "precision_at"),
    ],
)
def test_what_can_not_be_scored_is_told(scores: Any, truth: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        evaluate(scores, truth)


def test_more_that_can_not_be_scored() -> None:
    with pytest.raises(InputError, match="column="):
        evaluate(np.zeros((12, 12)), "ioi", column="score")
    with pytest.raises(InputError, match="seed"):
        evaluate(np.eye(12), "ioi", seed=-1)
    with pytest.raises(UnknownNameError, match="ioi"):
        evaluate(np.eye(12), "ioj")
    with pytest.raises(HeadError):
        evaluate(np.eye(12), "0.1,zero")
    with pytest.raises(InputError, match="NaN"):
        roc([0.0, np.nan], [True, False])
    with pytest.raises(InputError, match="labels"):
        roc([0.0, 1.0], [True])


def test_incomplete_lists_give_ranks_and_small_k_alone() -> None:
    truth = published("retrieval", "llama-2-13b-64k")
    scores = np.zeros((40, 40))
    scores[13, 23], scores[0, 0], scores[9, 33] = 0.9, 0.8, 0.7
    assert precision_at(scores, truth, 1) == 1 and precision_at(scores, truth, 2) == 0.5
    assert ranks(scores, truth) == {Head(13, 23): 1.0, Head(9, 33): 3.0}
    with pytest.raises(InputError, match="1 to 2"):
        precision_at(scores, truth, 3)


def test_areas_of_a_faithful_circuit_at_mibs_sizes() -> None:
    sizes = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    assert curve_areas(sizes, [1.0] * 10) == pytest.approx((0.999, 0.0))
    assert curve_areas(sizes, [0.0] * 10) == pytest.approx((0.0, 0.999))
    assert curve_areas(sizes, [1.5] * 10) == pytest.approx((1.5 * 0.999, 0.5 * 0.999))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=8, unique=True),
    st.lists(st.floats(-2, 3), min_size=8, max_size=8),
)
def test_areas_are_the_trapezoid_rule(points: list[int], values: list[float]) -> None:
    x, f = np.array(sorted(points)) / 1000, np.array(values[: len(points)])
    cpr, cmd = curve_areas(x.tolist(), f.tolist())
    assert cpr == pytest.approx(scipy.integrate.trapezoid(f, x), abs=1e-12)
    assert cmd == pytest.approx(scipy.integrate.trapezoid(np.abs(1 - f), x), abs=1e-12)


@pytest.mark.parametrize(
    ("x", "f"),
    [
        ([0.5], [1.0]),
        ([0, 1], [1.0]),
        ([0, 0], [1, 1]),
        ([1, 0], [1, 1]),
        ([0, 2], [1, 1]),
        ([0, 1], [1, np.nan]),
    ],
)
def test_curves_that_are_none(x: list[float], f: list[float]) -> None:
    with pytest.raises(InputError):
        curve_areas(x, f)


def test_jaccard_and_stability() -> None:
    assert jaccard("0.1,0.2", ["L0H2", (0, 3)]) == pytest.approx(1 / 3)
    assert jaccard([], []) == 1 and jaccard(["0.1"], []) == 0
    found = stability([["0.1", "0.2"], ["0.2", "0.1"], ["0.1"]])
    assert found.mean == pytest.approx((1 + 0.5 + 0.5) / 3) and found.n == 3
    assert 0.5 <= found.low <= found.mean <= found.high <= 1
    with pytest.raises(InputError, match="two or more"):
        stability([["0.1"]])


@pytest.mark.parametrize(
    ("mean", "n", "passes"), [(0.8, 100, True), (0.79, 100, False), (0.9, 99, False)]
)
def test_the_reporting_bar(mean: float, n: int, passes: bool) -> None:
    assert Stability(mean, mean, mean, n).reportable is passes


def test_a_circuit_is_compared_with_its_own_model_s_truth_by_name() -> None:
    """And several circuits in one table, the best first."""

    from interp.circuits import compare

    truth = published("ioi", "pocket-llama")

    def made(method: str, values: np.ndarray) -> SimpleNamespace:
        frame = pd.DataFrame(
            [(h // 8, h % 8, v) for h, v in enumerate(values)], columns=["layer", "head", method]
        )
        search = SimpleNamespace(method=method, forwards=2.0, backwards=1.0, seconds=0.5)
        return SimpleNamespace(frame=frame, column=method, model="pocket-llama", search=search)

    right = made("right", truth.matrix().ravel().astype(float))
    wrong = made("wrong", 1 - truth.matrix().ravel().astype(float))
    assert evaluate(right, "ioi").auc == 1.0 and evaluate(right, "ioi").n_heads == 32
    table = compare([wrong, right], "ioi")
    assert table["method"].tolist() == ["right", "wrong"] and table["auc"].tolist() == [1.0, 0.0]
    assert published("ioi", SimpleNamespace(name="pocket-llama")).heads == truth.heads


# --- how sure an AUC is
# --------------------------------------------------------------------------------------------


def test_hanley_and_mcneil_s_own_example() -> None:
    """Their paper: an area of .893 over 51 abnormal and 58 normal cases has a standard error of
    .032."""
    low, high = hanley_mcneil(0.893, 51, 58)
    assert (high - low) / 2 / 1.96 == pytest.approx(0.0325, abs=5e-4)
    assert hanley_mcneil(1.0, 5, 20) == (1.0, 1.0)
    assert hanley_mcneil(0.5, 1, 1) == (0.0, 1.0)


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_areas_of_many_rankings_at_once_are_those_of_each(seed: int, n: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    positives = np.arange(n) < rng.integers(1, n)
    rows = rng.integers(0, levels, (3, n)).astype(float)
    for row, auc in zip(rows, auc_of(rows, positives), strict=True):
        wins = [(a > b) + (a == b) / 2 for a in row[positives] for b in row[~positives]]
        assert auc == pytest.approx(np.mean(wins))


def test_the_interval_of_a_difference_holds_0_for_twins_and_not_for_a_better_ranking() -> None:
    positives = np.arange(120) < 30
    holds = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        one, *others = (rng.normal(size=120) + 0.8 * positives for _ in range(4))
        mean, low, high = difference(one, others, positives, seed)
        assert low <= mean <= high
        holds += low <= 0 <= high
    assert holds >= 34  # 95 % of 40, less three standard deviations
    rng = np.random.default_rng(0)
    better, worse = rng.normal(size=120) + 3 * positives, rng.normal(size=120)
    mean, low, _ = difference(better, [worse], positives, 0)
    own, other = auc_of(better, positives), auc_of(worse, positives)
    assert mean == pytest.approx(own - other) and low > 0


def test_an_auc_over_prompts_is_as_wide_as_over_new_prompts() -> None:
    """Ten heads that do something, thirty that do not: the spread over fresh draws of prompts is
    that of the bootstrap of one draw, to a factor of two."""
    positives = np.arange(40) < 10

    def drawn(seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(size=(40, 50))
        return noise + 0.25 * positives[:, None]

    fresh = [float(auc_of(np.abs(drawn(s).mean(1)), positives)) for s in range(200)]
    wide = np.subtract(*np.quantile(fresh, [0.975, 0.025]))
    found = [auc_over_prompts(drawn(s), positives, s) for s in range(10)]
    mean = np.mean([high - low for low, high in found if low is not None])
    assert 0.5 < mean / wide < 2
    assert auc_over_prompts(drawn(0)[:, :1], positives, 0) is None
