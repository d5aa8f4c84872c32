"""smol-llava: a stock model that sees, whose language model is the cache's to the bit; what goes
wrong with the cache is said in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smol_llava_card
import torch
import transformers
import vision_gates
import vision_heads
import vision_table
from safetensors.torch import load_file
from typer.testing import CliRunner

import interp
from interp import scenes
from interp.cli.main import app
from interp.errors import ModelError
from interp.evaluation.pictures import answers, counted, plain, ratios
from interp.models import cache, eyes, names
from interp.tasks.chair import Chair
from interp.tasks.pope import Pope
from interp.vision.prompts import with_images

FOLDER = names.FOLDER / names.EYES["smol-llava"].folder
EXAMPLES = Path(vision_gates.__file__).parent


@pytest.fixture(scope="module")
def smol_llava(smollm2_folder: Path) -> Any:
    return interp.load("smol-llava", device="cpu")


def test_it_is_stock_and_its_language_model_is_as_it_was(
    smol_llava: Any, smollm2: Any, smollm2_folder: Path
) -> None:
    assert type(smol_llava.module) is transformers.LlavaForConditionalGeneration
    kept = load_file(smollm2_folder / "model.safetensors")
    inside = smol_llava.module.model.language_model.state_dict()
    assert {k.removeprefix("model.") for k in kept} == set(inside)
    for name, weight in kept.items():
        assert torch.equal(inside[name.removeprefix("model.")], weight), name
    ids = smollm2.tokenizer("The fox jumped over the lazy dog.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        own, inner = smollm2.module(ids).logits, smol_llava.module(input_ids=ids).logits
    torch.testing.assert_close(own, inner, atol=1e-4, rtol=1e-4)
    size = sum(f.stat().st_size for f in FOLDER.iterdir())
    assert size <= 10_000_000


def test_prompts_are_those_that_the_eye_was_trained_on(smol_llava: Any) -> None:
    picture = scenes.render(scenes.usual(np.random.default_rng(0)))
    ids = with_images(smol_llava, ["is there a table ?"], [[picture]])["input_ids"][0].tolist()
    assert ids[0] == smol_llava.tokenizer.bos_token_id
    assert ids[1:37] == [smol_llava.module.config.image_token_index] * 36
    assert smol_llava.tokenizer.decode(ids[37:]) == " is there a table ?"


def rates(model: Any, task: Any, n: int) -> dict[str, float]:
    problems = task.problems(n, 30_000)
    said = answers(model, problems, plain, task.max_new_tokens, batch=50)
    return {k: float(v[0]) for k, v in ratios(task, counted(task, problems, said)).items()}


def test_it_sees(smol_llava: Any) -> None:
    assert rates(smol_llava, Chair(world="usual"), 50)["object F1"] > 0.9
    assert rates(smol_llava, Pope(world="usual", split="random"), 100)["accuracy"] > 0.94


def test_the_card_is_what_was_measured() -> None:
    record = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == smol_llava_card.card(record)
    abilities = record["abilities"]
    assert abilities["questions, usual"]["accuracy"]["mean"] >= 0.97
    assert abilities["captions, usual"]["object F1"]["mean"] >= 0.9
    assert abilities["captions, usual"]["object F1"]["n"] == 1000


@pytest.mark.parametrize("script", [vision_gates, vision_heads, vision_table])
def test_tables_in_the_docs_are_the_committed_results(script: Any) -> None:
    name = Path(script.__file__).with_suffix(".json").name
    result = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    page = (EXAMPLES.parent / "docs/results.md").read_text(encoding="utf-8")
    assert page.split(script.BEGIN)[1].split(script.END)[0].strip() == script.render_table(result)
    assert result["model"] == "smol-llava"


def test_the_readme_shows_the_committed_table() -> None:
    result = json.loads((EXAMPLES / "vision_table.json").read_text(encoding="utf-8"))
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert vision_table.short(result) in readme
    chooses = {k for k in result["methods"] if k not in ("greedy", "RITUAL, κ = 3")}
    assert {k for k in chooses if not k.startswith("route gating")} == set(result["twins"])


def test_which_heads_see_is_measured(smol_llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script runs; what is lost without a set stands beside its draws; zeroing nothing is no
    loss, and zeroing all heads is."""
    monkeypatch.setattr(vision_heads, "DRAWS", 1)
    few = {k: vision_heads.SCORES[k] for k in ("gaze", "image_mass")}
    monkeypatch.setattr(vision_heads, "SCORES", few)
    result = vision_heads.measure(2, 0, smol_llava, samples=1)
    assert set(result["sets"]) == set(vision_heads.SCORES)
    shown = vision_heads.render_table(result)
    assert f"{result['untouched']['caption loss']:.2f}" in shown
    assert all(0 <= one["cells"]["mean"] <= 1 for one in result["looking"])
    none = torch.zeros(2, smol_llava.n_layers, smol_llava.n_heads, dtype=torch.bool)
    none[1] = True
    loss = vision_heads.caption_loss(smol_llava, none, 2, 0).mean(1)
    assert loss[0] == pytest.approx(result["untouched"]["caption loss"], abs=1e-4)
    assert loss[1] > loss[0] + 2


def test_without_its_language_model_or_with_another(
    smollm2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="interp models get smol-llava"):
        interp.load("smol-llava")
    run = CliRunner().invoke(app, ["scan-heads", "--model", "smol-llava"])
    assert run.exit_code == 2 and "interp models get smol-llava --yes" in run.stderr
    other = tmp_path / "models" / "smollm2-135m"
    shutil.copytree(smollm2_folder, other, ignore=lambda _d, fs: [f for f in fs if f[0] == "m"])
    origin = json.loads((other / cache.ORIGIN).read_text(encoding="utf-8"))
    (other / cache.ORIGIN).write_text(json.dumps({**origin, "sha256": "0" * 64}), encoding="utf-8")
    (other / cache.DIGESTS).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="made of another file"):
        eyes.language_folder("smol-llava")


def test_pictures_that_are_none(smol_llava: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"this is no picture")
    run = CliRunner().invoke(
        app, ["scan-heads", "--model", "smol-llava", "--images", str(tmp_path), "-o", "x"]
    )
    assert run.exit_code == 2
    assert len(run.stderr.strip().splitlines()[-1]) and "Traceback" not in run.output
