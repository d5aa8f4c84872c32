"""Bad input: one typed exception, one sentence that says what was wrong and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import interp
from interp import edits, scores, tasks
from interp.errors import (
    ActivationError,
    ContextError,
    EditError,
    HeadError,
    InputError,
    InterpError,
    ModelError,
    OutputError,
    UnknownNameError,
)
from interp_hooks import HookedModel, hook
from interp_hooks.errors import TapError

Worded = Callable[[str], tuple[HookedModel, Any]]


def one_sentence(error: pytest.ExceptionInfo[InterpError]) -> str:
    text = str(error.value)
    assert isinstance(error.value, InterpError)
    assert "\n" not in text and 10 < len(text) < 400, text
    assert text.rstrip().endswith((".", ")", "?")), text
    return text


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    """A saved tiny model with its tokenizer."""
    place = tmp_path / "model"
    tiny.build("llama", len(tokenizer)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_a_saved_folder_loads(folder: Path) -> None:
    model = interp.load(str(folder), device="cpu")
    assert (model.name, model.n_layers, model.n_heads) == ("model", 2, 4)
    assert model.tokenizer is not None


@pytest.mark.parametrize(
    ("written", "meant"),
    [("pocket-lama", "pocket-llama"), ("qwen3-8", "qwen3-8b"), ("GPT-2", "gpt2")],
)
def test_unknown_model_suggests_a_name(written: str, meant: str) -> None:
    with pytest.raises(ModelError) as error:
        interp.load(written)
    assert meant in one_sentence(error) and repr(written) in str(error.value)


def test_unknown_model_unlike_any() -> None:
    with pytest.raises(ModelError) as error:
        interp.load("zzzzzzzz")
    assert "interp models" in one_sentence(error)


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError) as error:
        interp.load("nobody-here/no-such-model")
    text = one_sentence(error)
    assert "nobody-here/no-such-model" in text and "network" in text


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        interp.load(tmp_path)
    assert "config.json" in one_sentence(error)


def test_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(ModelError) as error:
        interp.load(folder)
    one_sentence(error)


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError) as error:
        interp.load(folder)
    assert "corrupt" in one_sentence(error)


def test_garbage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ModelError) as error:
        interp.load(folder)
    one_sentence(error)


def test_missing_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    gone = "model.layers.1.self_attn.q_proj.weight"
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        interp.load(folder)
    assert gone in one_sentence(error)


def test_tensors_of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as error:
        interp.load(folder)
    assert "config.json" in one_sentence(error)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelError) as error:
        interp.load(folder)
    assert "safetensors" in one_sentence(error)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError) as error:
        interp.load(folder)
    one_sentence(error)


@pytest.mark.parametrize(
    "options", [dict(device="tpu9"), dict(dtype="float13"), dict(backend="fast")], ids=str
)
def test_bad_options(folder: Path, options: dict[str, str]) -> None:
    with pytest.raises(InterpError) as error:
        interp.load(folder, **options)
    assert next(iter(options.values())) in one_sentence(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(folder: Path) -> None:
    with pytest.raises(ModelError) as error:
        interp.load(folder, device="cuda")
    assert "cpu" in one_sentence(error)


def test_not_a_model() -> None:
    with pytest.raises(TapError) as error:
        interp.load(torch.nn.Linear(2, 2))
    assert "Linear" in one_sentence(error)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nan_weights_name_the_layer(worded: Worded, tokenizer: Any, name: str, layer: int) -> None:
    """Under the tap, in a scan and on load."""
    module = tiny.build(name, len(tokenizer))
    model = hook(module, tokenizer=tokenizer)
    with torch.no_grad():
        tiny.output_module(tiny.layers(module)[layer]).weight.fill_(1.0)
        values = (
            getattr(tiny.layers(module)[layer], "v_proj", None) or tiny.layers(module)[layer].c_attn
        )
        values.weight.fill_(float("nan"))
    with pytest.raises(ActivationError) as error, torch.no_grad(), model.observe("entropy"):
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert f"layer {layer}" in one_sentence(error)
    with pytest.raises(ActivationError) as error:
        interp.scan_heads(model, ["sink"], 48, 1, progress=False)
    assert f"layer {layer}" in one_sentence(error)
    with pytest.raises(ActivationError) as error:
        hook(module)
    assert f"layer {layer}" in one_sentence(error)


def test_unknown_score_before_the_model_is_loaded() -> None:
    with pytest.raises(UnknownNameError) as error:
        interp.scan_heads("no-such-model", scores="sinkk")
    assert "sink" in one_sentence(error)
    assert isinstance(error.value, KeyError)


def test_no_scores(worded: Worded) -> None:
    for nothing in ("", []):
        with pytest.raises(InputError) as error:
            interp.scan_heads(worded("llama")[0], scores=nothing)
        one_sentence(error)


def test_context_beyond_the_limit(worded: Worded) -> None:
    model = worded("llama")[0]
    with pytest.raises(ContextError) as error:
        interp.scan_heads(model, ["sink"], context=129, samples=1)
    assert (
        "128" in one_sentence(error)
        and "129" in str(error.value)
        and "--extrapolate" in str(error.value)
    )
    atlas = interp.scan_heads(
        model, ["sink"], context=140, samples=1, extrapolate=True, progress=False
    )
    assert atlas.provenance["settings"]["extrapolate"] is True
    assert any("beyond" in note for note in atlas.notes)


@pytest.mark.parametrize("settings", [dict(context=8), dict(samples=0), dict(samples=-1)], ids=str)
def test_scan_too_small(worded: Worded, settings: dict[str, int]) -> None:
    with pytest.raises(InputError) as error:
        interp.scan_heads(worded("llama")[0], ["sink"], **settings)
    one_sentence(error)


def test_no_tokenizer() -> None:
    with pytest.raises(InputError) as error:
        interp.scan_heads(hook(tiny.build("llama")), ["sink"], 48, 1)
    assert "tokenizer" in one_sentence(error)


@pytest.mark.parametrize(
    "content",
    [b"", b"  \n\t ", b"\xff\xfe\x00broken", None],
    ids=["empty", "blank", "binary", "missing"],
)
def test_text_file_that_is_no_text(worded: Worded, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        interp.scan_heads(worded("llama")[0], ["sink"], 48, 1, text=path)
    assert str(path) in one_sentence(error)


def test_text_file_is_read(worded: Worded, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The old king crossed the river near a tower. " * 3)
    plan = interp.plan_scan(worded("llama")[0], ["sink"], 48, 2, text=path)
    row = plan._batches["text"][0].input_ids[0]
    assert "old king crossed the river" in worded("llama")[0].tokenizer.decode(row)


def test_a_file_in_the_way_of_the_output(worded: Worded, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError) as error:
        interp.scan_heads(worded("llama")[0], ["sink"], 48, 1, out=tmp_path / "out", progress=False)
    assert str(tmp_path / "out") in one_sentence(error)
    assert (tmp_path / "out").read_text() == "mine"


def test_no_atlas_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InterpError) as error:
        interp.Atlas.load(tmp_path)
    one_sentence(error)


# --- heads, edits, tasks
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["9.0", "L0H4", "vision.L0H0"])
def test_no_such_head(worded: Worded, head: str) -> None:
    model = worded("llama")[0]
    for edit in (edits.ScaleHeads({head: 0.0}), edits.Ablate(head)):
        with pytest.raises(HeadError) as error, model.edit(edit):
            pass
        one_sentence(error)
    with pytest.raises(HeadError):
        interp.ablate(model, head, task="ioi", n=2)


@pytest.mark.parametrize(
    "written", ["", "L5", "x.y", "5.1.2", "-1.0", (1, 2, 3), (1.5, 0), (-1, 0)], ids=str
)
def test_not_a_head(written: Any) -> None:
    with pytest.raises(HeadError) as error:
        interp.Head.parse(written)
    one_sentence(error)


@pytest.mark.parametrize(
    "written", ["L5H1", "5.1", "5-1", "a5.h1", "l5h1", (5, 1), interp.Head(5, 1)], ids=str
)
def test_spellings_of_a_head(written: Any) -> None:
    assert interp.Head.parse(written) == interp.Head(5, 1)
    assert str(interp.Head.parse(written)) == "L5H1"
    assert interp.Head.parse("vision.L5H1") == interp.Head(5, 1, "vision")


def test_bad_edits() -> None:
    for make in (
        lambda: edits.Ablate("0.0", mode="half"),
        lambda: edits.Ablate("0.0", mode="mean"),
        lambda: edits.Ablate("0.0", scope="now"),
        lambda: edits.ScaleHeads({"0.0": float("nan")}),
    ):
        with pytest.raises(EditError) as error:
            make()
        one_sentence(error)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("{", EditError),
        ('{"gains": {"0.0": 1}}', EditError),
        ('{"edit": "scale_headz", "gains": {"0.0": 1}}', UnknownNameError),
        ('{"edit": "scale_heads", "gain": {"0.0": 1}}', EditError),
        ('{"edit": "scale_heads", "gains": {"0.0": "loud"}}', EditError),
        ('{"edit": "scale_heads", "gains": [1, 2]}', EditError),
        ('{"edit": "scale_heads", "gains": {"zero": 1}}', HeadError),
        ('{"edit": "ablate", "heads": ["0.0"], "mode": "mean"}', EditError),
        ('{"edit": 3}', InterpError),
        ('["scale_heads"]', EditError),
        ('"scale_heads"', EditError),
        ("7", EditError),
    ],
)
def test_bad_edit_files(tmp_path: Path, content: str, kind: type[InterpError]) -> None:
    path = tmp_path / "edit.json"
    path.write_text(content)
    with pytest.raises(kind) as error:
        edits.load(path)
    one_sentence(error)


def test_edit_file_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as error:
        edits.load(tmp_path / "none.json")
    one_sentence(error)


def test_edits_go_to_json_and_back(tmp_path: Path) -> None:
    made = [
        edits.ScaleHeads({"L1H2": 0.5, (0, 3): 2}, scope="decode"),
        edits.Ablate(["0.1", "vision.L2H0"], "resample", "ioi", 7, "prefill"),
        edits.Ablate(None, "uniform"),
    ]
    path = edits.save(tmp_path / "edits.json", made)
    assert edits.load(path) == made
    assert edits.save(tmp_path / "a" / "new" / "folder.json", made).is_file()
    assert json.loads(path.read_text())[0]["gains"] == {"L1H2": 0.5, "L0H3": 2.0}
    with pytest.raises(OutputError) as error:
        edits.save(path / "below_a_file.json", made)
    one_sentence(error)


def test_unknown_reference(worded: Worded) -> None:
    with (
        pytest.raises(InterpError) as error,
        worded("llama")[0].edit(edits.Ablate("0.0", "mean", "no_such_task")),
    ):
        pass
    one_sentence(error)


def test_unknown_names() -> None:
    for get, written, meant in (
        (scores.get, "inductoin", "induction"),
        (tasks.get, "iou", "ioi"),
        (edits.registry.get, "ablation", "ablate"),
    ):
        with pytest.raises(UnknownNameError) as error:
            get(written)
        assert meant in one_sentence(error)


def test_unknown_task_before_the_model_is_loaded() -> None:
    for run in (
        lambda: interp.evaluate("no-such-model", "iou"),
        lambda: interp.ablate("no-such-model", "0.0", task="iou"),
    ):
        with pytest.raises(UnknownNameError) as error:
            run()
        assert "ioi" in one_sentence(error)


@pytest.mark.parametrize("n", [0, -3])
def test_evaluate_needs_instances(worded: Worded, n: int) -> None:
    with pytest.raises(InputError) as error:
        interp.evaluate(worded("llama")[0], "ioi", n=n)
    one_sentence(error)


def test_task_longer_than_the_model(tokenizer: Any) -> None:
    model = hook(
        tiny.build("llama", len(tokenizer), max_position_embeddings=64), tokenizer=tokenizer
    )
    with pytest.raises(ContextError) as error:
        interp.evaluate(model, "induction", n=2)
    one_sentence(error)


def test_no_heads_to_ablate(worded: Worded) -> None:
    for nothing in ("", [], " , "):
        with pytest.raises(InputError) as error:
            interp.ablate(worded("llama")[0], nothing, task="ioi", n=2)
        one_sentence(error)


def test_nothing_is_written_into_the_model_folder(folder: Path, tmp_path: Path) -> None:
    before = sorted((p.name, p.stat().st_size) for p in folder.iterdir())
    copy = shutil.copytree(folder, tmp_path / "copy")
    interp.scan_heads(str(copy), ["sink"], 48, 1, out=tmp_path / "out", progress=False)
    assert sorted((p.name, p.stat().st_size) for p in copy.iterdir()) == before
