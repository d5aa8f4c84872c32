"""The training script runs end to end, resumes, and leaves a model that loads, with its card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import train_pocket_llama as script

import interp


def arguments(out: Path, **changes: object) -> argparse.Namespace:
    given = dict(
        out=str(out),
        minutes=0,
        tokens=8000,
        device="cpu",
        threads=2,
        seed=0,
        lr=2e-3,
        scale=1,
        every=60,
    )
    return argparse.Namespace(**{**given, "state": None, "compile": False, **changes})


@pytest.mark.long
def test_trains_and_writes_a_model_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "PROBLEMS", 2)
    script.train(arguments(tmp_path))
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert record["tokens"] >= 8000 and set(record["abilities"]) >= {
        "ioi",
        "induction",
        "niah@1024",
    }
    assert "4 layers × 8 heads" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "training_state.pt").exists()
    model = interp.load(str(tmp_path))
    assert (model.n_layers, model.n_heads, model.n_kv_heads) == (4, 8, 4)


def test_weak_heads_fade_first_and_stay_at_zero() -> None:
    model = script.build_model(script.build_tokenizer(), 0)
    weight = model.model.layers[0].self_attn.o_proj.weight
    with torch.no_grad():
        weight[:, :32] *= 0.1
    blocks = weight.detach().view(128, 8, 32)
    before = blocks.square().sum((0, 2)).sqrt().clone()
    script.fade_heads(model, 0.2)
    after = blocks.square().sum((0, 2)).sqrt()
    assert float(after[0]) == 0 and bool((after[1:] > 0.8 * before[1:]).all())
    script.fade_heads(model, 0.2)
    assert float(blocks[:, 0].abs().max()) == 0 and bool(torch.isfinite(blocks).all())


def test_rows_are_full_and_start_with_bos() -> None:
    tokenizer = script.build_tokenizer()
    corpus = script.Language(tokenizer)
    for _, length, _, _, mixture in script.CURRICULUM:
        rows = corpus.batch(0, 0, 2, length, mixture)
        assert rows.shape == (2, length) and bool((rows[:, 0] == tokenizer.bos_token_id).all())
        assert torch.equal(rows, corpus.batch(0, 0, 2, length, mixture))
