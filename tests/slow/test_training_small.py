"""Training scripts of pocket-whisper and pocket-dit run to the end, resume bit by bit, and leave
models that load; what they committed is what their cards say."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import speech_checks
import torch
import train_pocket_dit
import train_pocket_whisper
from safetensors.torch import load_file

import interp
from interp import diffusion, scenes

ROOT = Path(__file__).parents[2]
SCRIPTS: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "whisper": (train_pocket_whisper, dict(melodies=2, lr=2e-3)),
    "dit": (train_pocket_dit, dict(pictures=6, lr=2e-3)),
}


def trained(name: str, out: Path, steps: int) -> Path:
    script, more = SCRIPTS[name]
    given = dict(out=out, steps=steps, batch=4, seed=0, every=2, threads=1, **more)
    script.train(argparse.Namespace(**given))
    return next(out.glob("*.safetensors"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_that_was_interrupted_ends_like_one_that_was_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_pocket_dit, "PICTURES", 40)
    whole = load_file(trained(name, tmp_path / "whole", 4))
    own, steps = torch.nn.utils.clip_grad_norm_, iter(range(10))

    def stop(*args: Any) -> Any:
        if next(steps) == 2:  # in the third step, after the checkpoint of two
            raise KeyboardInterrupt
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", stop)
        with pytest.raises(KeyboardInterrupt):
            trained(name, tmp_path / "parts", 4)
    assert (tmp_path / "parts" / "state.pt").exists()
    again = load_file(trained(name, tmp_path / "parts", 4))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    record = json.loads((tmp_path / "parts" / "training.json").read_text(encoding="utf-8"))
    card = (tmp_path / "parts" / "README.md").read_text(encoding="utf-8")
    assert record["steps"] == 4 and all(f"{v:.3f}" in card for v in record["abilities"].values())
    assert interp.load(str(tmp_path / "parts")).n_layers == (2 if name == "whisper" else 6)


def test_pocket_whisper_is_what_its_card_says() -> None:
    folder = ROOT / "interp/models/pocket_whisper"
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    model = interp.load("whisper")
    found = train_pocket_whisper.measure(
        model.module, train_pocket_whisper.build_extractor(), model.tokenizer, 200
    )
    assert found["transcripts right"] > record["abilities"]["transcripts right"] - 0.02
    assert train_pocket_whisper.edits(["do", "re"], ["re", "mi"]) == 2


def test_pocket_dit_is_what_its_card_says() -> None:
    folder = ROOT / "interp/models/pocket_dit"
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    model = interp.load("dit")
    labels = torch.arange(48) % 6
    drawn = train_pocket_dit.draw(model.module, labels, 1.0, 25, 1)
    same = diffusion.draw(model, {"class_labels": labels}, steps=25, seed=1)
    torch.testing.assert_close(drawn, same, atol=1e-4, rtol=1e-3)
    names, read = list(scenes.DOT_COLORS), [scenes.read_dots(p.numpy()) for p in drawn]
    right = [set(r.colors) - {None} == {names[c]} for r, c in zip(read, labels, strict=True)]
    told = record["abilities"]["one colour, the right one, guidance 1"]
    assert np.mean(right) > told - 0.1


def test_the_table_of_speech_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["speech_checks.py", "--n", "2"])
    speech_checks.main()
    said = capsys.readouterr().out
    assert said.count("| lrp |") == 2 and "attention on the told note: L0H0" in said


def test_the_page_says_what_the_hunt_found() -> None:
    found = json.loads((ROOT / "examples/diffusion_checks.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    section = page[page.index("### In a sampling loop") :].split("\n## ")[0]

    def said(number: float) -> str:
        return f"{number:.2f}".replace("0.", ".").replace("-", "−")

    for name, row in found["objectives"].items():
        line = next(x for x in section.splitlines() if x.startswith(("| purer " if name == "colour"
                    else "| ") + name))  # fmt: skip
        assert (", ".join(row["heads"]) or "none") in line
        if not row["heads"]:
            assert "| – | – |" in line
            continue
        sign = -1 if name == "fewer dots" else 1  # the page counts dots
        ends = sorted(sign * row["gain"][k] for k in ("low", "high"))
        assert f"[{said(ends[0])}, {said(ends[1])}]" in line
        assert said(abs(row["gain"]["mean"])) in line and row["beats_random"]
        assert all(said(abs(f(sign * r for r in row["random"]))) in line for f in (min, max))
