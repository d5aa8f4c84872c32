"""Evaluations beside the same edits of random heads: each draw is an evaluation of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import interp
from interp import edits as E
from interp.cli.main import app
from interp.edits.relocated import named_heads, relocated
from interp.errors import EditError, InputError, OutputError
from interp.tasks.answers import judge
from interp_hooks import Head

PLACES = {Head(2, 3): Head(2, 6), Head(1, 2): Head(1, 0)}
TURNED = {Head(2, 3): torch.arange(1.0, 33.0), Head(1, 2): torch.ones(32)}
#: an edit of L2H3 and L1H2, and the same of L2H6 and L1H0
PAIRS = {
    "ablate": (E.Ablate(["L2H3", "L1H2"]), E.Ablate(["L2H6", "L1H0"])),
    "scale": (E.ScaleHeads({"L2H3": 0.5, "L1H2": 2}), E.ScaleHeads({"L2H6": 0.5, "L1H0": 2})),
    "shift": (E.ShiftHeads(TURNED), E.ShiftHeads({PLACES[h]: v for h, v in TURNED.items()})),
    "rotate": (E.RotateHeads(TURNED), E.RotateHeads({PLACES[h]: v for h, v in TURNED.items()})),
    "zero_tuning": (
        E.ZeroTuning({"L2H3": 3.0, "L1H2": 0.5}),
        E.ZeroTuning({"L2H6": 3.0, "L1H0": 0.5}),
    ),
    "temperature": (
        E.Temperature(0.5, heads=["L2H3", "L1H2"]),
        E.Temperature(0.5, heads=["L2H6", "L1H0"]),
    ),
    "scale_tokens": (
        E.ScaleTokens((0, 2), 3.0, heads=["L2H3", "L1H2"]),
        E.ScaleTokens((0, 2), 3.0, heads=["L2H6", "L1H0"]),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_an_edit_of_other_heads_is_the_edit_made_for_them(name: str, pocket: Any) -> None:
    edit, wanted = PAIRS[name]
    moved = relocated(edit, PLACES)
    assert named_heads([edit]) == [Head(1, 2), Head(2, 3)]
    assert moved.to_json() == wanted.to_json() and named_heads([moved]) == named_heads([wanted])
    ids = torch.arange(3, 19)[None]
    logits = []
    for one in (moved, wanted, edit):
        with pocket.edit(one):
            logits.append(pocket.logits(ids))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert named_heads([edit]) == [Head(1, 2), Head(2, 3)]  # the edit itself is as it was


def test_each_draw_is_an_evaluation_of_its_own(pocket: Any, tmp_path: Path) -> None:
    edit = E.ScaleHeads({"L2H3": 0.0, "L1H2": 0.0})
    runs: list[int] = []

    def judging(model: Any, task: Any, instances: Any, edits: Any = (), *rest: Any) -> Any:
        runs.append(len(edits))
        return judge(model, task, instances, edits, *rest)

    seen: list[tuple[int, int, str]] = []
    found = interp.evaluate(
        pocket, "ioi", [edit], n=8, controls=3, judging=judging,
        progress=lambda *at: seen.append(at),
    )  # fmt: skip
    assert runs == [0, 1, 1, 1, 1]  # the untouched model answers once
    assert found.control is not None and len(found.control.heads) == 3
    changes = []
    for i, heads in enumerate(found.control.heads):
        assert [Head.parse(h).layer for h in heads] == [1, 2]
        assert not {"L1H2", "L2H3"} & set(heads)
        alone = interp.evaluate(pocket, "ioi", [E.ScaleHeads(dict.fromkeys(heads, 0.0))], n=8)
        assert found.frame[f"control_{i}"].tolist() == alone.frame["edited"].tolist()
        changes.append(alone.frame.edited - alone.frame.baseline)
    assert found.control.draws == pytest.approx([float(c.mean()) for c in changes])
    assert found.control.difference.mean == pytest.approx(np.mean(changes))
    plain = interp.evaluate(pocket, "ioi", [edit], n=8)
    assert plain.control is None and plain.difference == found.difference
    assert found.difference is not None
    assert found.control.beyond.mean == pytest.approx(
        found.difference.mean - found.control.difference.mean
    )
    assert seen[-1][0] == seen[-1][1] and all(a[0] <= b[0] for a, b in zip(seen, seen[1:]))  # noqa: B905, RUF007
    again = interp.Evaluation.load(found.save(tmp_path / "saved"))
    assert again.control == found.control and again.summary() == found.summary()
    assert "random heads" in found._repr_html_()
    head = tmp_path / "saved" / "evaluation.json"
    content = json.loads(head.read_text(encoding="utf-8"))
    content["control"]["heads"] = [["L1H0"]]
    head.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(OutputError, match="damaged"):
        interp.Evaluation.load(tmp_path / "saved")


def test_losses_have_controls_too(pocket: Any) -> None:
    found = interp.evaluate(
        pocket, None, [E.Ablate(["L2H3"])], n=2, metric="loss", context=64, controls=2
    )
    assert found.control is not None and len(found.control.draws) == 2
    assert {"control_0", "control_1"} <= set(found.frame)


def test_where_no_head_stands_in_a_sentence_says_so(pocket: Any) -> None:
    every = [f"L{layer}H{h}" for layer in range(4) for h in range(5)]
    for edits, words in [
        ([E.ZeroTuning(2.0)], "name none"),
        ([E.Ablate(every)], "fewer other heads"),
        ([], "beside edits"),
    ]:
        with pytest.raises(InputError, match=words):
            interp.evaluate(pocket, "induction", edits, n=2, controls=2)
    with pytest.raises(InputError, match="draws of them"):
        interp.evaluate(pocket, "induction", [E.Ablate(["L2H3"])], n=2, controls=-1)
    with pytest.raises(EditError, match="key/value heads"):
        both = [E.Ablate(["L2H3"]), E.Gate({"L1H0": 0.5})]
        interp.evaluate(pocket, "induction", both, n=2, controls=1)


def test_the_command_line_shows_them(tmp_path: Path) -> None:
    file = tmp_path / "edits.json"
    E.save(file, [E.Ablate(["L2H3"])])
    words = ["evaluate", "--model", "llama", "--task", "induction", "--edit", str(file)]
    done = CliRunner().invoke(app, [*words, "--n", "4", "--controls", "2"])
    assert done.exit_code == 0, done.output
    assert "random heads" in done.output and "2 draws of random heads" in done.output
    done = CliRunner().invoke(app, [*words, "--n", "4", "--controls", "2", "--json"])
    said = json.loads(done.output[done.output.index("{") :])
    assert len(said["control"]["draws"]) == 2
