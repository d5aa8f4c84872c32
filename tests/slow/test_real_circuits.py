"""The circuits of a real model: a task is measured piece by piece and goes on, and what is rendered
is what was measured."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import real_circuits as page
from scipy.stats import hypergeom

import interp
from interp.circuits import controls

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (ROOT / "examples/real_circuits.json").read_text(encoding="utf-8")
    )
    return found


def test_a_task_is_measured_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "METHODS", {"EAP": ("eap", {})})
    model = interp.load("llama", device="cpu")
    options = Namespace(state=str(tmp_path), icl="", truth_prompts=8, n=8, draws=1)
    found = page.one(model, "ioi", options)
    assert set(found["truths"]) == {"mean", "resample"} and "EAP" in found["curves"]
    for name in ("measured", "find", "bench", "faithfulness"):  # what is finished is not run again
        monkeypatch.setattr(page.circuits, name, None, raising=False)
    monkeypatch.setattr(page, "measured", None)
    again = page.one(model, "ioi", options)
    assert json.dumps(again, default=str) == json.dumps(found, default=str)


def test_shared_heads_are_counted_beside_chance() -> None:
    def task(*heads: str) -> dict[str, Any]:
        return {"truths": {"resample": {"heads": dict.fromkeys(heads, "helps")}}}

    (row,) = page.shared({"a": task("L0H0", "L0H1"), "b": task("L0H1", "L1H0")}, 2, 4)
    assert (row["shared"], row["heads"]) == (1, ["L0H1"])
    # of layer 0, one head is drawn among four of which two are a's; of layer 1 none is
    assert row["expected"] == pytest.approx(0.5)
    assert row["p"] == pytest.approx(hypergeom.sf(0, 4, 2, 1))


def test_the_page_holds_the_committed_table(committed: dict[str, Any]) -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert text.split(page.BEGIN)[1].split(page.END)[0].strip() == page.render(committed)


def test_every_row_beats_or_fails_its_control_in_print(committed: dict[str, Any]) -> None:
    for task in committed["tasks"].values():
        rows = pd.DataFrame(task["rows"])
        mine = rows[~rows["method"].isin(controls.names())]
        assert set(mine["method"]) == set(page.METHODS)
        assert (mine["control"] != "").all() and mine["gain_low"].notna().all()
        assert ((mine["gain_low"] > 0) == mine["beats"]).all()
        assert set(rows["truth"]) == set(page.TRUTHS)
