"""The table of interventions on pictures: every method runs, and what is rendered is what was
measured."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_pocket_llava as script
import vision_table as table
from published import earlier, where

from interp.tasks.chair import Chair
from interp_hooks import HookedModel, hook


@pytest.fixture(scope="module")
def model() -> HookedModel:
    processor = script.build_processor()
    module = script.build_model(processor.tokenizer, 0)
    with torch.no_grad():  # a sink at the first token, and one in the image, for VAR to find
        module.get_input_embeddings().weight[processor.tokenizer.bos_token_id, 3] = 30.0
    return hook(module, name="random llava", processor=processor)


def test_every_method_is_measured_and_shown(
    model: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["noise", "POPE adversarial"]
    monkeypatch.setattr(Chair, "max_new_tokens", 6)
    result = table.measure(4, 0, model, tasks=tasks, state=tmp_path)
    assert set(result["methods"]) >= {"greedy", "VHR, α = 2", "VAR, paper", "DAMRO, α = 2, k = 10"}
    shown = table.render_table(result)
    greedy = result["methods"]["greedy"]["noise"]["CHAIR_I"]
    assert greedy["difference"] is None and f"{greedy['baseline']['mean']:.3f}" in shown
    for label, cells in result["methods"].items():
        assert set(cells) == set(tasks) and shown.count(f"| {label} |") in (1, 2)
        for task in tasks:
            assert all((one["difference"] is None) == (label == "greedy")
                       for one in cells[task].values())  # fmt: skip
    # what was answered is kept: a second run asks nothing, and finds the same
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.iterdir())
    again = table.measure(4, 0, model, tasks=tasks, state=tmp_path)
    assert before == sorted(p.stat().st_mtime_ns for p in tmp_path.iterdir())
    assert again["methods"] == result["methods"] and again["twins"] == result["twins"]


def test_twins_have_as_many_heads_of_the_same_layers_and_turn_with_the_pictures(
    model: HookedModel,
) -> None:
    counts = torch.randint(0, 5, (45, 4), generator=torch.Generator().manual_seed(0))
    counts[20:40] = counts[:20]
    chosen = table.Twins(model, 0).heads(counts)
    assert torch.equal(chosen.sum(-1), counts)
    assert torch.equal(chosen[:20], chosen[20:40])
    assert len({tuple(row.flatten().tolist()) for row in chosen[:20]}) == 20
    patches = table.Twins(model, 0).patches(torch.full((45,), 7), 45, 36)
    assert patches.shape == (45, 36) and bool((patches.sum(1) == 7).all())
    assert {h.layer for h in table.fixed_heads(model, 0, n=4)} == {1, 2, 3}


def test_the_interval_against_a_twin_knows_of_the_draws() -> None:
    """Pictures of one draw that succeed or fail together are one witness, not many."""
    weights = table.resampled(200, 0)
    assert weights.shape[1] == 200 and bool((weights.sum(1) == 200).all())
    draw = np.arange(200) % table.DRAWS
    together = (draw < 10).astype(float)
    apart = np.random.default_rng(0).permutation(together)
    spread = [float(np.std(weights @ x / 200)) for x in (together, apart)]
    assert spread[0] == pytest.approx(0.5 / 20**0.5, rel=0.1)
    assert spread[1] < 0.7 * spread[0]


def test_tasks_of_another_run_stay_beside_those_of_this_one(tmp_path: Path) -> None:
    def run(*tasks: str, value: float, only: str = "VAR") -> dict[str, Any]:
        cells = {name: {"CHAIR_I": value} for name in tasks}
        stamps = {name: {"machine": "m", "date": str(value)} for name in tasks}
        return dict(n=4, seed=0, draws=20, methods={"greedy": cells, only: cells},
                    twins={only: cells}, stamps=stamps)  # fmt: skip

    before = run("noise", "blur", value=1.0)
    both = table.joined(before, run("usual", "blur", value=2.0))
    assert list(both["methods"]["VAR"]) == ["usual", "noise", "blur"] == list(both["stamps"])
    assert [c["CHAIR_I"] for c in both["twins"]["VAR"].values()] == [2.0, 1.0, 2.0]
    assert where(both["stamps"].values()) == "m, 2.0; m, 1.0"
    assert set(table.joined(before, run("noise", value=2.0, only="VHR"))["methods"]) == {
        "greedy",
        "VAR",
        "VHR",
    }
    assert table.joined({}, before) is before
    out = Namespace(out=str(tmp_path / "t.json"))
    assert earlier(out, n=4) == {}
    Path(out.out).write_text(json.dumps(before), encoding="utf-8")
    assert earlier(out, n=4, seed=0) == before
    with pytest.raises(SystemExit, match=r"measured with \{'n': 4\}, not \{'n': 5\}"):
        earlier(out, n=5, seed=0)
