"""The table of circuit methods: every method runs on every case beside its control, and what is
rendered is what was measured."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import circuit_table as table
import pandas as pd
import pytest

from interp.circuits import constructed, controls, names, published
from interp.circuits.benching.bench import apart
from interp.circuits.measured import APART
from interp.circuits.runs.prompts import from_task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (ROOT / "examples/circuit_table.json").read_text(encoding="utf-8")
    )
    return found


def test_a_method_is_measured_beside_its_control_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = table.cases(tmp_path, ["negative"])
    row = table.METHODS["EAP"]
    frame = table.measure(case, "EAP", row, 8, 1, tmp_path)
    assert set(frame["ranked"]) == {"heads", "edges"} and set(frame["control"]) == {
        "labels",
        "pairs",
    }
    assert (frame["case"] == "negative").all() and frame["cpr_edges"].notna().all()
    monkeypatch.setattr(table, "bench", None)  # what is finished does not run again
    pd.testing.assert_frame_equal(table.measure(case, "EAP", row, 8, 1, tmp_path), frame)
    lines = table.table(frame, "known", "edges", ["negative"])
    assert len(lines) == 3 and lines[2].startswith("| EAP | ")
    assert f"{frame[frame.ranked == 'edges'].auc.iloc[0]:.2f}" in lines[2]


def test_a_row_that_does_not_beat_its_twin_has_a_mark() -> None:
    base = dict(auc=0.9, auc_low=0.8, auc_high=1.0)
    rows = [dict(base, control="labels", beats=True), dict(base, control="pairs", beats=False)]
    assert table.cell(pd.DataFrame(rows)) == "0.90† [0.80, 1.00]"
    assert table.cell(pd.DataFrame(rows[:1])) == "0.90 [0.80, 1.00]"
    assert table.cell(pd.DataFrame([dict(base, control="", beats=False)])) == "0.90 [0.80, 1.00]"
    assert table.cell(pd.DataFrame()) == "–"


def test_no_prompt_of_a_truth_is_seen_by_a_method() -> None:
    import interp

    model = interp.load("llama", device="cpu")
    for task in table.POCKET:
        seen = {i.ids for i in from_task(model, task, table.TRUTH_PROMPTS, APART).instances}
        drawn = apart(model, task, 64, 0, table.TRUTH_PROMPTS).instances
        assert len({i.ids for i in drawn} - seen) == 64, task


def test_the_page_holds_the_committed_table(committed: dict[str, Any]) -> None:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert page.split(table.BEGIN)[1].split(table.END)[0].strip() == table.render(committed)
    rows = pd.DataFrame(committed["rows"])
    assert set(rows["method"]) <= {*table.METHODS, *controls.names()}
    known = {*table.POCKET, *constructed.names(), *(f"planted {t}" for t in table.POCKET)}
    assert set(committed["cases"]) <= known
    shown = set(table.POCKET) & set(committed["cases"])
    bundled = {t for t in shown if (table.BUNDLED / "pocket-llama" / f"{t}.json").is_file()}
    assert len(bundled) >= 3
    for task in bundled:  # the others' were measured with the table
        assert committed["truths"][task]["mean"] == len(published(task, "pocket-llama").heads)


def test_every_method_there_is_has_a_row_in_the_script() -> None:
    assert {row.method for row in table.METHODS.values()} == set(names())


def test_every_row_beats_or_fails_its_control_in_print(committed: dict[str, Any]) -> None:
    rows = pd.DataFrame(committed["rows"])
    mine = rows[~rows["method"].isin(controls.names())]
    assert mine["control"].notna().all() and (mine["control"] != "").all()
    assert mine["gain_low"].notna().all()
    assert ((mine["gain_low"] > 0) == mine["beats"]).all()


def test_some_method_finds_the_edges_of_constructed_circuits(committed: dict[str, Any]) -> None:
    """The bar: an edge AUC of .95 by at least one method on every constructed truth measured."""
    rows = pd.DataFrame(committed["rows"])
    edges = rows[(rows["ranked"] == "edges") & ~rows["method"].isin(controls.names())]
    best = edges.groupby("case")["auc"].max()
    assert len(best) and (best >= 0.95).all(), best


def test_rows_of_another_run_stay_beside_those_of_this_one(
    tmp_path: Path, committed: dict[str, Any]
) -> None:
    (case,) = table.cases(tmp_path, ["negative"])
    mine = [r for r in committed["rows"] if (r["case"], r["method"]) == ("negative", "EAP")]
    frame = pd.DataFrame(mine).assign(auc=0.123, machine="other", date="today")
    options = Namespace(out=str(tmp_path / "t.json"), page=None, n=48, draws=2)
    table.publish_with(committed, [case], frame, options)
    made = json.loads(Path(options.out).read_text(encoding="utf-8"))
    assert len(made["rows"]) == len(committed["rows"]) and made["cases"] == committed["cases"]
    new = [r for r in made["rows"] if r["auc"] == 0.123]
    assert {(r["case"], r["method"]) for r in new} == {("negative", "EAP")}
    assert made["truths"] == committed["truths"]
