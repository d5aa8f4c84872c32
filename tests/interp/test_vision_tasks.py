"""Tasks about pictures: questions and counts by hand, files of the published form, ratios, whole
evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_pocket_llava as script
from typer.testing import CliRunner

import interp
from interp import scenes, tasks, vision
from interp.cli.main import app
from interp.edits import ScaleTokens
from interp.errors import InputError
from interp.evaluation.pictures import (
    answers,
    compare,
    counted,
    evaluate_images,
    plain,
    ratios,
    under,
)
from interp.results.evaluation import Evaluation
from interp.scenes import OBJECTS, PARTNER
from interp.tasks.chair import Chair
from interp.tasks.images import Picture
from interp.tasks.pope import Pope, said_yes
from interp_hooks import HookedModel, hook


@pytest.fixture(scope="module")
def model() -> HookedModel:
    processor = script.build_processor()
    module = script.build_model(processor.tokenizer, 0)
    return hook(module, name="random llava", processor=processor)


def test_pope_asks_as_many_of_yes_as_of_no() -> None:
    for split in ("random", "popular", "adversarial", "all"):
        found = Pope(split=split).problems(60, seed=1)
        assert len(found) == 60 and found == Pope(split=split).problems(90, seed=1)[:60]
        labels = [p.info["label"] for p in found]
        assert labels.count("yes") == labels.count("no") == 30
        for problem in found:
            assert (problem.info["object"] in problem.info["names"]) == (
                problem.info["label"] == "yes"
            )
            assert problem.prompt == f"is there a {problem.info['object']} ?"
        assert {p.info["split"] for p in found} == (
            {split} if split != "all" else {"random", "popular", "adversarial"}
        )


def test_splits_ask_for_other_absent_objects() -> None:
    absent: dict[str, list[Picture]] = {
        split: [p for p in Pope(split=split).problems(300) if p.info["label"] == "no"]
        for split in ("random", "popular", "adversarial")
    }
    expected = {
        s: np.mean([p.info["object"] in {PARTNER.get(n) for n in p.info["names"]} for p in ps])
        for s, ps in absent.items()
    }
    assert expected["adversarial"] > 0.6 > expected["popular"] and expected["random"] < 0.4
    place = {s: np.mean([OBJECTS.index(p.info["object"]) for p in ps]) for s, ps in absent.items()}
    assert place["popular"] < place["random"] - 3


@pytest.mark.parametrize(
    ("answer", "yes"),
    [("yes", True), ("Yes, there is a dog.", True), ("no", False), ("No.", False), ("there is "
                                                                                    "not", False),
     ("There is. No doubt.", True), ("", True), ("nothing known", True)],
)  # fmt: skip
def test_reading_of_answers(answer: str, yes: bool) -> None:
    assert said_yes(answer) == yes


def test_pope_metrics_by_hand() -> None:
    task = Pope()
    labels = ["yes", "yes", "yes", "no", "no", "no"]
    said = ["yes", "yes", "no", "yes", "no", "no"]  # 2 hits, 1 missed, 1 false alarm
    problems = [Picture(None, "", i // 2, dict(label=label)) for i, label in enumerate(labels)]
    found = ratios(task, counted(task, problems, said))
    expected = {
        "accuracy": 4 / 6,
        "F1": 2 / 3,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "share of yes": 0.5,
    }
    assert {k: float(v[0]) for k, v in found.items()} == pytest.approx(expected)


def test_chair_metrics_by_hand() -> None:
    task = Chair()
    truth = [{"table", "ball"}, {"cup"}]
    said = ["a red table and a chair and a table .", "a plate and a cup and a tree ."]
    problems = [Picture(None, "", i, dict(names=frozenset(t))) for i, t in enumerate(truth)]
    found = {k: float(v[0]) for k, v in ratios(task, counted(task, problems, said)).items()}
    expected = {
        "CHAIR_I": 3 / 5,
        "CHAIR_S": 1.0,
        "object F1": 2 * 2 / (5 + 3),
        "object recall": 2 / 3,
        "words": 8.5,
    }
    assert found == pytest.approx(expected)


def test_differences_are_paired_and_resampled_by_picture() -> None:
    task, rng = Pope(), np.random.default_rng(0)
    problems = [Picture(None, "", i // 3, dict(label="yes" if i % 2 else "no")) for i in range(90)]
    said = [("yes" if rng.random() < 0.5 else "no") for _ in problems]
    better = [
        p.info["label"] if rng.random() < 0.5 else a for p, a in zip(problems, said, strict=True)
    ]
    frames = {
        name: counted(task, problems, what)
        for name, what in dict(a=said, b=better, same=said).items()
    }
    found = compare(task, frames, seed=1)
    assert found["a"]["accuracy"].difference is None
    same = found["same"]["F1"].difference
    assert same is not None and (same.mean, same.low, same.high) == (0, 0, 0)
    change = found["b"]["accuracy"].difference
    assert change is not None and change.low < change.mean < change.high and change.n == 30
    right = frames["b"].right.mean() - frames["a"].right.mean()
    assert change.mean == pytest.approx(right)
    means = [(frames["b"].right - frames["a"].right).groupby(frames["a"].group).sum().to_numpy()]
    draws = np.random.default_rng(5).integers(0, 30, (4000, 30))
    low, high = np.quantile(means[0][draws].sum(1) / 90, [0.025, 0.975])
    assert (change.low, change.high) == pytest.approx((low, high), abs=0.03)


def test_published_questions(tmp_path: Path) -> None:
    lines = [
        dict(question_id=1, image="a.jpg", text="Is there a dog in the image?", label="yes"),
        dict(question_id=2, image="a.jpg", text="Is there a cat in the image?", label="no"),
        dict(question_id=3, image="b.jpg", text="Is there a cat in the image?", label="no"),
    ]
    file = tmp_path / "coco_pope_random.json"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    found = Pope.from_file(file, tmp_path).problems(10)
    assert [p.group for p in found] == [0, 0, 1] and found[0].image == tmp_path / "a.jpg"
    assert [p.info["label"] for p in found] == ["yes", "no", "no"]
    for text, says in (
        ("{}", "Line 1"),
        ('{"image": 1, "text": "a", "label": "maybe"}', "maybe"),
        ("", "no questions"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=says):
            Pope.from_file(file, tmp_path)
    with pytest.raises(InputError, match="can't be read"):
        Pope.from_file(tmp_path / "none.json", tmp_path)


def test_coco_annotations(tmp_path: Path) -> None:
    content = dict(
        categories=[dict(id=1, name="dog"), dict(id=2, name="hot dog"), dict(id=3, name="person")],
        images=[dict(id=10, file_name="a.png"), dict(id=11, file_name="gone.png")],
        annotations=[
            dict(image_id=10, category_id=2),
            dict(image_id=10, category_id=3),
            dict(image_id=11, category_id=1),
        ],
    )
    annotations, synonyms = tmp_path / "instances.json", tmp_path / "synonyms.txt"
    annotations.write_text(json.dumps(content), encoding="utf-8")
    synonyms.write_text("person, man, woman\ndog, puppy\n", encoding="utf-8")
    scenes.render(scenes.usual(np.random.default_rng(0))).save(tmp_path / "a.png")
    task = Chair.from_coco(annotations, tmp_path, synonyms)
    (problem,) = task.problems(5)
    assert problem.info["names"] == {"hot dog", "person"}
    assert task.named("A man with two hot dogs and a puppy.") == {"person", "hot dog", "dog"}
    assert Chair.from_coco(annotations, tmp_path).named("A man with two hot dogs.") == {"hot dog"}
    with pytest.raises(InputError, match="None of the pictures"):
        Chair.from_coco(annotations, tmp_path / "elsewhere")
    annotations.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="not a file of COCO"):
        Chair.from_coco(annotations, tmp_path)


def test_evaluation_end_to_end(model: HookedModel, tmp_path: Path) -> None:
    result = interp.evaluate(model, "pope", [ScaleTokens("image", 0.0)], n=12)
    assert (result.task, result.metric) == ("pope", "accuracy") and result.mcnemar is not None
    assert set(result.more) == {"F1", "precision", "recall", "share of yes"}
    assert len(result.frame) == 12 and {"baseline_answer", "edited_answer"} <= set(
        result.frame.columns
    )
    again = Evaluation.load(result.save(tmp_path / "pope"))
    assert again.more == result.more and again.difference == result.difference
    told = interp.evaluate(model, "chair", n=3)
    assert told.metric == "CHAIR_I" and told.edited is None and told.more["words"].baseline.mean > 0


def test_answers_do_not_depend_on_the_batch(model: HookedModel) -> None:
    problems = Chair().problems(5)
    together = answers(model, problems, plain, 8)
    assert together == answers(model, problems, plain, 8, batch=1)
    assert together == answers(model, problems, under(ScaleTokens("image", 1.0)), 8)


def test_every_image_task_needs_a_model_that_sees() -> None:
    llama = interp.load("llama")
    for name in ("pope", "chair"):
        with pytest.raises(InputError, match="takes no images"):
            interp.evaluate(llama, name, n=2)
        with pytest.raises(InputError, match="asks about pictures"):
            tasks.get(name).sample(llama.tokenizer, 1)
    with pytest.raises(InputError, match="own metrics"):
        interp.evaluate(llama, "pope", n=2, context=64)


def test_bad_settings(model: HookedModel) -> None:
    with pytest.raises(InputError, match="splits of pope"):
        Pope(split="hard")
    for kind in (Pope, Chair):
        with pytest.raises(InputError, match="usual or broken"):
            kind(world="flat")
    with pytest.raises(InputError, match="n ≥ 1"):
        evaluate_images(model, Pope(), [], 0, 0)


def test_prompts_with_images(model: HookedModel, tmp_path: Path) -> None:
    picture = scenes.render(scenes.usual(np.random.default_rng(0)))
    file = tmp_path / "scene.png"
    picture.save(file)
    one = vision.with_images(model, "is there a chair ?", [picture])
    same = vision.with_images(model, "<image> is there a chair ?", [file])
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert vision.spans(model, one["input_ids"]) == [[(1, 65)]]
    both = vision.with_images(
        model, ["is there a chair ?", "describe the picture :"], [picture, [file]]
    )
    assert both["attention_mask"][1, 0] == 0 or both["attention_mask"][0, 0] == 0
    assert model.processor.tokenizer.padding_side == "left"
    two = vision.with_images(model, "<image> and <image> is there a cup ?", [picture, picture])
    assert [len(s) for s in vision.spans(model, two["input_ids"])] == [2]
    bare = vision.without_images(model, both)
    assert bare["input_ids"].shape[1] == both["input_ids"].shape[1] - 64
    cases: list[tuple[Any, Any, str]] = [
        ("is there a chair ?", [], "has no image"),
        ("<image> <image> a", [picture], "2 × <image> and 1 images"),
        ("<image> a", [picture, picture], "1 × <image> and 2 images"),
        (["a", "b"], [picture], "2 prompts and images for 1"),
        ("a", [tmp_path / "none.png"], "There is no image"),
    ]
    for texts, images, says in cases:
        with pytest.raises(InputError, match=says):
            vision.with_images(model, texts, images)
    with pytest.raises(InputError, match="where its image would stand"):
        vision.with_images(model, "a chair", [picture], place=False)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(InputError, match="can't be read as an image"):
        vision.with_images(model, "a chair", [file])


def test_chat_templates_are_used(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt without marks is a user's turn; one with marks is left as it is."""
    template = (
        "<s>{% for m in messages %}this {% for c in m.content %}{% if c.type == 'image' %}<image> "
        "{% endif %}"
        "{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} in picture :{% endif %}"
    )
    monkeypatch.setattr(model.processor, "chat_template", template)
    picture = scenes.render(scenes.usual(np.random.default_rng(0)))
    made = vision.with_images(model, "is there a cup ?", [picture])
    words = model.tokenizer.convert_ids_to_tokens(made["input_ids"][0])
    assert words[:3] == ["<s>", "this", "<image>"] and words.count("<image>") == 64
    assert words[66:] == "is there a cup ? in picture :".split()
    own = vision.with_images(model, "<image> is there a cup ?", [picture])
    assert (
        model.tokenizer.convert_ids_to_tokens(own["input_ids"][0])[65:]
        == "is there a cup ?".split()
    )


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path) -> None:
    processor = script.build_processor()
    folder = tmp_path / "model"
    script.build_model(processor.tokenizer, 0).save_pretrained(folder)
    processor.save_pretrained(folder)
    file = tmp_path / "scene.png"
    scenes.render(scenes.usual(np.random.default_rng(0))).save(file)
    edit = tmp_path / "edit.json"
    edit.write_text('[{"edit": "scale_tokens", "keys": "image", "gain": 0.5}]', encoding="utf-8")

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    asked = run(
        "generate",
        "--model",
        folder,
        "--prompt",
        "is there a cup ?",
        "--image",
        file,
        "--max-new-tokens",
        3,
    )
    assert asked.exit_code == 0 and asked.stdout.strip()
    both = run(
        "evaluate",
        "--model",
        folder,
        "--task",
        "pope",
        "--n",
        6,
        "--edit",
        edit,
        "--out",
        tmp_path / "pope",
    )
    assert both.exit_code == 0, both.output
    assert all(
        word in both.stdout
        for word in ("accuracy", "F1", "precision", "recall", "share of yes", "McNemar")
    )
    shown = run("show", tmp_path / "pope")
    assert shown.exit_code == 0 and "share of yes" in shown.stdout
    for arguments, says in (
        (("generate", "--model", "llama", "--prompt", "a", "--image", file), "takes no images"),
        (
            ("generate", "--model", folder, "--prompt", "a", "--image", tmp_path / "none.png"),
            "There is no image",
        ),
        (
            ("generate", "--model", folder, "--prompt", "<image> <image> a", "--image", file),
            "one an image",
        ),
        (("evaluate", "--model", "llama", "--task", "chair", "--n", 2), "takes no images"),
        (("scan-heads", "--model", "llama", "--scores", "vhd"), "takes no images"),
    ):
        made = run(*arguments)
        assert isinstance(made.exception, (InputError, SystemExit)), arguments
        assert says in str(made.exception) or says in made.output, (arguments, made.output)


def test_captions_that_are_begun() -> None:
    """True: exactly what is there; false: one thing, which is not, a missing companion if there is
    one. Both leave the scene and its picture as they are."""
    plain, true, false = (Chair(begun=b).problems(40) for b in ("", "true", "false"))
    for a, b, c in zip(plain, true, false, strict=True):
        assert a.info["names"] == b.info["names"] == c.info["names"]
        assert b.prompt.startswith(a.prompt) and b.prompt.endswith(" and")
        assert set(scenes.mentions(b.prompt)) == a.info["names"]
        (invented,) = scenes.mentions(c.prompt)
        assert invented not in a.info["names"]
        missing = {PARTNER[n] for n in a.info["names"] if n in PARTNER} - a.info["names"]
        assert invented in missing or not missing
        place = c.prompt.removesuffix(" and").split()[-2:]
        assert " ".join(place) not in {t.place for t in a.info["scene"].things}
        assert (np.asarray(a.image) == np.asarray(c.image)).all()


def test_damaged_pictures_and_leading_questions() -> None:
    whole, blurred = Chair().problems(3), Chair(damage="blur", level=3).problems(3)
    for a, b in zip(whole, blurred, strict=True):
        assert a.prompt == b.prompt and a.info["names"] == b.info["names"]
        assert (np.asarray(a.image) != np.asarray(b.image)).any()
    for a, b in zip(Pope().problems(9), Pope(leading=True).problems(9), strict=True):
        assert b.prompt == f"this is a picture of a {a.info['object']} . {a.prompt}"
    for bad in (dict(damage="rain"), dict(level=4), dict(begun="half")):
        with pytest.raises(InputError):
            Chair(**bad)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        Pope(damage="rain")
