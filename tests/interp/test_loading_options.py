"""Where a loaded model's weights go: device map, dtype, quantisation, revision, sample; and what of
them is refused, in Python and on the command line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from tiny import build
from typer.testing import CliRunner

import interp
from interp.cli.main import app
from interp.errors import InputError, MissingExtraError, ModelError
from interp.models import placing

IDS = torch.tensor([[5, 17, 3, 99, 42]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tiny"
    build("llama").save_pretrained(path)
    return path


@torch.no_grad()
def test_a_device_map_places_the_model(folder: Path) -> None:
    pytest.importorskip("accelerate")
    want = interp.load(folder, device="cpu")
    for device_map in ("auto", "cpu", {"": "cpu"}):
        model = interp.load(folder, device_map=device_map)
        assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        if model.device.type == "cpu":
            assert torch.equal(model.logits(IDS), want.logits(IDS))


@torch.no_grad()
def test_layers_on_disk(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    parts = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    places = {f"model.{part}": "cpu" for part in parts}
    places |= {"lm_head": "cpu", "model.layers.1": "disk"}
    want, model = interp.load(folder, device="cpu"), interp.load(folder, device_map=places)
    assert model.device == torch.device("cpu")
    assert torch.equal(model.logits(IDS), want.logits(IDS))
    assert torch.equal(model.head_weights(1).W_V, want.head_weights(1).W_V)


def test_dtypes_by_name_and_by_their_old_name(folder: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16, "torch.bfloat16"):
        model = interp.load(folder, device="cpu", dtype=dtype)
        assert next(model.module.parameters()).dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="torch_dtype is called dtype now"):
        model = interp.load(folder, device="cpu", torch_dtype="float64")
    assert next(model.module.parameters()).dtype == torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = interp.load(folder, device="cpu", dtype="auto")
    assert next(model.module.parameters()).dtype == torch.float32
    with pytest.raises(InputError, match="old name"):
        interp.load(folder, dtype="float32", torch_dtype="float32")
    with pytest.raises(ModelError, match="'int8' is not a dtype"):
        interp.load(folder, dtype="int8")


def test_the_sample_of_the_check(folder: Path) -> None:
    model = interp.load(folder, device="cpu", sample=dict(input_ids=IDS))
    assert model.n_layers == 2
    model = interp.load(build("llama"), sample=dict(input_ids=IDS))
    assert model.n_layers == 2


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="both say where the model goes"):
        interp.load(folder, device="cpu", device_map="auto")
    with pytest.raises(ModelError, match="'nowhere' is not a device"):
        interp.load(folder, device_map="nowhere")
    with pytest.raises(InputError, match="word"):
        interp.load(folder, device_map=3)
    with pytest.raises(InputError, match="no quantisation '3bit'; there are 8bit, 4bit"):
        interp.load(folder, quantization="3bit")
    with pytest.raises(InputError, match="not a dict"):
        interp.load(folder, quantization={"bits": 4})
    with pytest.raises(InputError, match="has no revisions"):
        interp.load(folder, revision="main")
    with pytest.raises(InputError, match="has no revisions"):
        interp.load("llama", revision="main")
    for option in (
        dict(dtype="float16"),
        dict(device_map="auto"),
        dict(quantization="8bit"),
        dict(revision="main"),
    ):
        with pytest.raises(InputError, match="a loaded model stays as it is"):
            interp.load(build("llama"), **option)  # type: ignore[arg-type]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(placing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install optimum-quanto"):
        interp.load(folder, quantization="quanto-int8")
    with pytest.raises(MissingExtraError, match="pip install accelerate"):
        interp.load(folder, device_map="auto")


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "package"),
    [("int8", "torchao"), ("quanto-int8", "optimum.quanto"), ("8bit", "bitsandbytes")],
)
def test_quantised_models(folder: Path, quantization: str, package: str) -> None:
    pytest.importorskip(package)
    model = interp.load(folder, device="cpu", quantization=quantization)
    plain = interp.load(folder, device="cpu")
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        ours, theirs = (getattr(m.head_weights(1), name) for m in (model, plain))
        assert not torch.equal(ours, theirs)
        assert float((ours - theirs).abs().max()) < 0.02 * float(theirs.abs().max())


def test_the_command_line_takes_them(folder: Path) -> None:
    runner = CliRunner()

    def told(*options: str) -> tuple[int, str]:
        result = runner.invoke(app, ["scan-heads", "--model", str(folder), *options])
        return result.exit_code, " ".join(result.output.split())

    cases = {
        ("--quantization", "3bit"): "no quantisation '3bit'",
        ("--device-map", "auto", "--device", "cpu"): "both say where",
        ("--revision", "main"): "has no revisions",
        ("--torch-dtype", "int3"): "'int3' is not a dtype",
    }
    for options, sentence in cases.items():
        code, output = told(*options)
        assert code == 2 and sentence in output, output
