"""`interp.compare`: numbers are scipy's, intervals and controls are those of their definitions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr
from typer.testing import CliRunner

import interp
from interp.cli.main import app
from interp.errors import InputError, OutputError, UnknownNameError
from interp.results.about import About
from interp.support import rank_agreement
from interp.support.rank_agreement import agreement, overlap_p, permutation_p

SHAPE = (6, 8, 4)


def atlas(values: dict[str, np.ndarray], shape: tuple[int, int, int] = SHAPE) -> interp.Atlas:
    layers, heads, kv_heads = shape
    rows = [("", "self", n, h, h * kv_heads // heads) for n in range(layers) for h in range(heads)]
    frame = pd.DataFrame(rows, columns=["tower", "kind", "layer", "head", "kv_head"])
    frame = frame.assign(**{name: v.ravel() for name, v in values.items()})
    return interp.Atlas(frame, {"model": "toy"}, (), {name: About(name) for name in values})


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def planted(noise: float, seed: int = 0, samples: int = 40) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores, and a file of samples of them with noise."""
    rng = np.random.default_rng(seed)
    true = rng.random(SHAPE[:2])
    return true, {
        f"{n}-{h}": (true[n, h] + noise * rng.standard_normal(samples)).tolist()
        for n in range(SHAPE[0])
        for h in range(SHAPE[1])
    }


ties = st.lists(st.integers(0, 4), min_size=3, max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_resample_is_that_of_the_repeated_places(data: st.DataObject) -> None:
    a = np.array(data.draw(ties), dtype=float)
    b = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(a), max_size=len(a))), float)
    many = data.draw(st.lists(st.integers(0, 3), min_size=len(a), max_size=len(a)))
    if sum(many) != len(a):  # a resample has as many places as there are
        many[0] += len(a) - sum(many)
    if min(many) < 0:
        return
    counts = np.array([many], dtype=float)
    x, y = np.repeat(a, many), np.repeat(b, many)
    rho = rank_agreement._weighted_rho(a, b, counts)[0]
    tau = rank_agreement._weighted_tau(a, b, counts)[0]
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert not np.isfinite(rho) and not np.isfinite(tau)
    else:
        assert rho == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)
        assert tau == pytest.approx(kendalltau(x, y).statistic, abs=1e-6)


def test_overlap_by_chance_is_counted_out() -> None:
    n, k = 7, 3
    mine = set(range(k))
    shared = [len(mine & set(other)) for other in itertools.combinations(range(n), k)]
    for least in range(k + 1):
        assert overlap_p(least, k, n) == pytest.approx(np.mean([s >= least for s in shared]))
    a = np.arange(n, dtype=float)
    assert agreement(a, a, k).expected == pytest.approx(np.mean(shared) / k)


def test_the_p_of_rho_is_that_of_all_orders() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(6), rng.random(6)
    rho = spearmanr(a, b).statistic
    exact = np.mean(
        [abs(spearmanr(a, p).statistic) >= abs(rho) - 1e-12 for p in itertools.permutations(b)]
    )
    assert permutation_p(a, b, rho, rng) == pytest.approx(exact, abs=0.03)


def test_intervals_cover_the_truth() -> None:
    """Bivariate normal places with ρ_s of the population known: about 95 % of intervals hold it."""
    rng, r = np.random.default_rng(0), 0.6
    truth = 6 / np.pi * np.arcsin(r / 2)
    inside = 0
    for _ in range(60):
        x = rng.standard_normal(80)
        y = r * x + np.sqrt(1 - r * r) * rng.standard_normal(80)
        low, high = agreement(x, y, 10).spearman_interval
        assert low is not None and high is not None
        inside += low <= truth <= high
    assert inside >= 51


def test_a_planted_pair(tmp_path: Path) -> None:
    true, theirs = planted(0.3)
    mine = atlas({"retrieval": true})
    row = interp.compare(mine, write(tmp_path / "t.json", theirs)).iloc[0]
    means = np.array([np.mean(v) for v in theirs.values()])
    assert row.spearman == pytest.approx(spearmanr(true.ravel(), means).statistic)
    assert row.kendall == pytest.approx(kendalltau(true.ravel(), means).statistic)
    top = [set(np.argsort(-v)[:10]) for v in (true.ravel(), means)]
    assert row.top10_overlap == len(top[0] & top[1]) / 10
    assert row.interval_over == "samples" and row.heads == 48
    assert 0.8 < row.spearman_low < row.spearman_high <= 1
    assert row.spearman_p < 0.01 and row.overlap_p < 0.01
    assert row.overlap_expected == pytest.approx(10 / 48)
    other = interp.compare(mine, atlas({"retrieval": np.random.default_rng(9).random((6, 8))}))
    assert other.spearman_p[0] > 0.05 and other.overlap_p[0] > 0.05
    assert other.interval_over[0] == "heads" and other.spearman_low[0] < 0 < other.spearman_high[0]


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    true, theirs = planted(0.5)
    path, mine = write(tmp_path / "t.json", theirs), atlas({"retrieval": true})
    first, again = interp.compare(mine, path), interp.compare(mine, path)
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(interp.compare(mine, path, seed=1))


def test_a_list_is_held_against_as_many_heads(tmp_path: Path) -> None:
    true, _ = planted(0)
    flat = true.ravel()
    best = np.argsort(-flat)[:3]
    listed = [[int(i // 8), int(i % 8)] for i in (best[0], best[2], np.argmin(flat))]
    mine = atlas({"sink": true, "entropy": 1 - true})
    table = interp.compare(mine, write(tmp_path / "l.json", listed)).set_index("score")
    assert table.k["sink ~ listed"] == 3
    assert table.top10_overlap["sink ~ listed"] == pytest.approx(2 / 3)
    assert table.top10_overlap["entropy ~ listed"] == pytest.approx(1 / 3)


def test_key_value_heads_against_query_heads(tmp_path: Path) -> None:
    true, _ = planted(0)
    gates = true.reshape(6, 4, 2).max(2)
    np.savetxt(tmp_path / "g.tsv", gates, delimiter="\t")
    mine = atlas({"retrieval": true})
    with pytest.raises(InputError, match=r'group="mean" or "max"'):
        interp.compare(mine, tmp_path / "g.tsv")
    row = interp.compare(mine, tmp_path / "g.tsv", group="max").iloc[0]
    assert row.heads == 24 and row.spearman == pytest.approx(1)
    mean = interp.compare(mine, tmp_path / "g.tsv", group="mean").iloc[0]
    expected = spearmanr(true.reshape(6, 4, 2).mean(2).ravel(), gates.ravel()).statistic
    assert mean.spearman == pytest.approx(expected)


def test_other_grids_are_refused(tmp_path: Path) -> None:
    _, theirs = planted(0.1)
    path = write(tmp_path / "t.json", theirs)
    small = atlas({"retrieval": np.random.default_rng(0).random((4, 8))}, (4, 8, 4))
    with pytest.raises(InputError, match=r"t\.json is of another model: it has head 4-0"):
        interp.compare(small, path)
    large = atlas({"retrieval": np.random.default_rng(0).random((12, 8))}, (12, 8, 4))
    with pytest.raises(InputError, match="holds 6 layers of 8 heads, and there are 12 layers"):
        interp.compare(path, large)
    lists = [write(tmp_path / f"{n}.json", [[0, n], [3, 1]]) for n in range(2, 4)]
    with pytest.raises(InputError, match="read them with model="):
        interp.compare(*lists)
    both = [interp.Atlas.read(p, SHAPE) for p in lists]
    assert interp.compare(*both).top10_overlap[0] == 0.5
    assert interp.compare(path, path).spearman[0] == pytest.approx(1)
    assert interp.compare(path, lists[0]).k[0] == 2


def test_what_is_asked_wrongly(tmp_path: Path) -> None:
    true, theirs = planted(0.1)
    mine, path = atlas({"retrieval": true}), write(tmp_path / "t.json", theirs)
    with pytest.raises(UnknownNameError):
        interp.compare(mine, path, "snk")
    with pytest.raises(InputError, match="at least 1"):
        interp.compare(mine, path, k=0)
    with pytest.raises(OutputError):
        interp.compare(mine, tmp_path / "gone")


def test_ties_for_the_last_place_are_said() -> None:
    flat = np.zeros((6, 8))
    flat[0, 0] = 1
    row = interp.compare(atlas({"a": flat}), atlas({"a": planted(0)[0]})).iloc[0]
    assert "47 heads of the first tie for the last 9 of its 10 strongest" in row.remark


def test_the_command_and_the_report(tmp_path: Path) -> None:
    true, theirs = planted(0.1)
    atlas({"retrieval": true}).save(tmp_path / "mine")
    path, page = write(tmp_path / "t.json", theirs), tmp_path / "r.html"
    said = ["compare", str(tmp_path / "mine"), str(path), "--report", str(page)]
    done = CliRunner().invoke(app, said, env={"COLUMNS": "140"})
    assert done.exit_code == 0 and "21%" in done.output and "< 0.001" in done.output
    assert "By chance" in page.read_text() and "t.json" in page.read_text()
    lists = [str(write(tmp_path / f"{n}.json", [[0, n], [3, 1]])) for n in range(2, 4)]
    assert CliRunner().invoke(app, ["compare", *lists]).exit_code == 2
    done = CliRunner().invoke(app, ["compare", *lists, "--shape", "6x8"])
    assert done.exit_code == 0 and "50%" in done.output
    assert CliRunner().invoke(app, ["compare", *lists, "--shape", "6x"]).exit_code == 2
    assert "retrieval" in CliRunner().invoke(app, ["show", str(path)]).output
