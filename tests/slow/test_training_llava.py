"""The vision-language training script runs end to end, resumes, and leaves a model that loads, with
its card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import train_pocket_llava as script

import interp
from interp import scenes, vision
from interp.scenes import OBJECTS


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arguments(out: Path, **changes: object) -> argparse.Namespace:
    given = dict(
        out=str(out),
        images=400,
        batch=16,
        device="cpu",
        threads=1,
        seed=0,
        lr=1e-3,
        bf16=False,
        every=60,
    )
    return argparse.Namespace(**{**given, "state": None, **changes})


@pytest.mark.long
def test_trains_and_writes_a_model_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SCENES", 6)
    script.train(arguments(tmp_path))
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert record["images"] >= 400 and "broken: yes to missing companions" in record["abilities"]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(f"{value:.3f}" in card for value in record["abilities"].values())
    assert not (tmp_path / "training_state.pt").exists()
    model = interp.load(str(tmp_path))
    assert model.towers == ["vision", "text"] and (
        model.n_layers,
        model.n_heads,
        model.n_kv_heads,
    ) == (4, 8, 4)


def test_resumes_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after a checkpoint and started again, it ends where the uninterrupted run
    ends."""
    ends = []
    monkeypatch.setattr(script, "finish", lambda model, *rest: ends.append(model.state_dict()))
    script.train(arguments(tmp_path / "whole", images=160))
    monkeypatch.setattr(script, "abilities", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        script.train(
            arguments(tmp_path / "cut", images=160, every=0)
        )  # a checkpoint a step, and no farther
    script.train(arguments(tmp_path / "cut", images=160))
    whole, cut = ends
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_lessons_ask_about_what_is_there_and_what_is_not() -> None:
    lessons = script.Lessons(script.build_processor().tokenizer)
    words = {i: w for w, i in lessons.ids.items()}
    for kinds in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        shown, pictures, ids, learn = lessons.batch(0, 0, 40, kinds)
        assert pictures.shape == (40, 3, 48, 48) and ids.shape == learn.shape
        for scene, row, wanted in zip(shown, ids, learn, strict=True):
            text = " ".join(
                words[int(t)] for t in row[1 + script.PATCHES :] if words[int(t)] != "<pad>"
            )
            learned = [words[int(t)] for t in row[wanted]]
            assert learned[-1] == "</s>" and (scenes.caption(scene) in text) == (kinds[1] == 0)
            asked = text.replace("</s>", "").split("is there a ")[1:]
            assert len(asked) == 0 if kinds[2] else len(asked) >= 2
            for one in asked:
                name, _, answer = one.split()
                assert name in OBJECTS and (name in scene.names) == (answer == "yes")
            answers = [w for w in learned if w in ("yes", "no")]
            assert len(answers) == len(asked)


def test_pictures_are_as_the_processor_makes_them(tmp_path: Path) -> None:
    processor = script.build_processor()
    script.build_model(processor.tokenizer, 0).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = interp.load(str(tmp_path))
    shown = [scenes.usual(np.random.default_rng(i)) for i in range(3)]
    made = vision.with_images(model, ["is there a cup ?"] * 3, [[scenes.render(s)] for s in shown])
    torch.testing.assert_close(made["pixel_values"], script.seen(shown), atol=1e-5, rtol=0)
    lessons = script.Lessons(processor.tokenizer)
    assert made["input_ids"][0].tolist() == lessons.head + lessons.encode("is there a cup ?")
    with torch.no_grad():  # the lesson's shorter way through the model is the model's
        wanted = model.module(**made).logits
        hidden = model.module.model.vision_tower(
            made["pixel_values"], output_hidden_states=True
        ).hidden_states
        features = model.module.model.multi_modal_projector(hidden[-2][:, 1:])
        embeds = model.module.get_input_embeddings()(made["input_ids"])
        embeds = torch.cat([embeds[:, :1], features, embeds[:, 65:]], 1)
        found = model.module.lm_head(
            model.module.model.language_model(inputs_embeds=embeds).last_hidden_state
        )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_cells_are_averages_of_their_patches() -> None:
    share = script.Seeing().share  # (cells, patches)
    assert share.shape == (9, 64)
    torch.testing.assert_close(share.sum(1), torch.ones(9))
    torch.testing.assert_close(share.sum(0), torch.full((64,), 9 / 64))
