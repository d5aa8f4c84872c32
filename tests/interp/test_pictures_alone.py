"""Models that read pictures alone take the scores of a vision tower: values of the untouched
model's attentions, from objects and folders, in Python and on the command line; refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from typer.testing import CliRunner

import interp
from interp.cli.main import app
from interp.errors import InputError
from interp.scenes import render, usual
from interp.vision.patches import PatchGrid, patch_grid
from interp.vision.tower_patterns import mean_patterns
from interp.vision.towers import picture_tower, sees_alone

SIZE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=99,
    bos_token_id=1,
    eos_token_id=2,
)
#: name → (the model, tokens before its patches)
KINDS: dict[str, tuple[Callable[[], Any], int]] = {
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**SIZE)), 1),
    "vit classifier": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZE, num_labels=5)), 1),
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZE)), 1),
    "clip classifier": (
        lambda: hf.CLIPForImageClassification(
            hf.CLIPConfig(vision_config=SIZE, text_config=TEXT, num_labels=5)
        ),
        1,
    ),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**SIZE)), 1),
    "registers": (
        lambda: hf.Dinov2WithRegistersModel(
            hf.Dinov2WithRegistersConfig(**SIZE, num_register_tokens=3)
        ),
        4,
    ),
    "dinov3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIZE, num_register_tokens=2)), 3),
    "deit": (lambda: hf.DeiTModel(hf.DeiTConfig(**SIZE)), 2),
    "beit": (lambda: hf.BeitModel(hf.BeitConfig(**SIZE, use_relative_position_bias=True)), 1),
    "siglip": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZE)), 0),
}
SEED, SAMPLES = 3, 2


def made(kind: str) -> Any:
    """A tiny model whose heads look in different places."""
    torch.manual_seed(0)
    module = KINDS[kind][0]().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("weight") and any(p in name for p in ("query", "key", "q_proj", "k_")):
                parameter.normal_(std=0.6)
            elif "embeddings" in name or "bias_table" in name:
                parameter.normal_(std=0.3)
            elif name.endswith("classifier.weight"):
                parameter.normal_(std=0.5)
    return module


def processor(height: int = 32, width: int = 32) -> Any:
    return hf.ViTImageProcessor(size=dict(height=height, width=width))


def pictures() -> list[Image.Image]:
    return [render(usual(np.random.default_rng([SEED, i]))) for i in range(SAMPLES)]


@contextmanager
def eager(module: Any) -> Iterator[Any]:
    """The untouched model in float64, answering with its attentions."""
    module.set_attn_implementation("eager")
    yield module.double()
    module.float()


def attentions(module: Any, read: Any) -> list[list[torch.Tensor]]:
    """By picture and layer (heads, slots, slots) float64, of the model's own eager attention."""
    seen = []
    with eager(module), torch.no_grad():
        for picture in pictures():
            pixels = read(images=[picture], return_tensors="pt")["pixel_values"].double()
            out = module(pixel_values=pixels, output_attentions=True)
            seen.append([a[0] for a in out.attentions])
    return seen


def distances(seen: list[list[torch.Tensor]], rows: int, columns: int, before: int) -> np.ndarray:
    """(layers, heads): mean_i Σ_j A_ij ‖p_i − p_j‖ / Σ_j A_ij."""
    places = [(i // columns, i % columns) for i in range(rows * columns)]
    far = torch.tensor([[np.hypot(a - c, b - d) for c, d in places] for a, b in places])
    values = []
    for layers in seen:
        own = torch.stack(layers)[..., before:, before:]  # (layers, heads, patches, patches)
        values.append(((own * far).sum(-1) / own.sum(-1)).mean(-1))
    return torch.stack(values).mean(0).numpy()


def outliers(seen: list[list[torch.Tensor]], before: int) -> np.ndarray:
    """(layers, heads): Σ_{j in top 10} A[CLS, j] / Σ_patches A[CLS, j], top by the last layer."""
    values = []
    for layers in seen:
        rows = torch.stack(layers)[..., 0, before:]  # (layers, heads, patches)
        top = rows[-1].mean(0).argsort(descending=True)[:10]
        values.append(rows[..., top].sum(-1) / rows.sum(-1))
    return torch.stack(values).mean(0).numpy()


def scan(model: Any, scores: Any = "default", **more: Any) -> interp.Atlas:
    return interp.scan_heads(
        model, scores, samples=SAMPLES, seed=SEED, **{"progress": False, **more}
    )


def close(atlas: interp.Atlas, score: str, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(atlas[score], float), wanted, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_eager_attentions(kind: str) -> None:
    module, before = made(kind), KINDS[kind][1]
    seen = attentions(module, processor())
    assert seen[0][0].shape[-1] == 16 + before
    model = interp.load(module, processor=processor())
    assert sees_alone(model) and picture_tower(model) == model.main_tower
    atlas = scan(model)
    assert atlas.scores == ["cls_outlier", "vit_distance"]
    wanted = distances(seen, 4, 4, before)
    close(atlas, "vit_distance", wanted)
    assert np.ptp(wanted) > 0.05
    if before:
        close(atlas, "cls_outlier", outliers(seen, before))
        assert not atlas.notes
    else:
        assert np.isnan(np.asarray(atlas["cls_outlier"], float)).all()
        (note,) = atlas.notes
        assert note.startswith("cls_outlier: not measured")
    assert "context" not in atlas.provenance["settings"]


def test_the_grid_is_that_of_the_pixels() -> None:
    """Another size than the config's, with interpolated positions: 4 rows of 6 patches."""
    module, read = made("dinov2"), processor(32, 48)
    seen = attentions(module, read)
    atlas = scan(interp.load(module, processor=read))
    close(atlas, "vit_distance", distances(seen, 4, 6, 1))
    close(atlas, "cls_outlier", outliers(seen, 1))


def test_grids_with_registers() -> None:
    config = hf.Dinov2WithRegistersConfig(**SIZE, num_register_tokens=3)
    assert patch_grid(config, 20, (32, 32)) == PatchGrid(4, 4, True, 3)
    assert patch_grid(config, 16, (32, 32)) == PatchGrid(4, 4, False)
    assert patch_grid(config, 17, (32, 32)) is None and patch_grid(config, 20) is None
    assert patch_grid(config, 20, (0, 0)) is None
    assert PatchGrid(4, 4, True, 3).cells(2).tolist()[:6] == [-1, -1, -1, -1, 0, 0]
    shuffled = hf.ViTMAEConfig(**SIZE, mask_ratio=0.0)
    assert patch_grid(shuffled, 17, (32, 32)) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit classifier", "clip classifier"])
def test_importance_for_a_class(kind: str) -> None:
    module = made(kind)
    read = processor()
    layers = [
        m
        for name, m in module.named_modules()
        if name.endswith(("attention.o_proj", "output.dense", "out_proj")) and m.in_features == 32
    ]
    wanted = np.zeros((3, 4))

    def answer(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return module(pixel_values=pixels).logits[0].log_softmax(-1)

    with eager(module):
        for picture in pictures():
            pixels = read(images=[picture], return_tensors="pt")["pixel_values"].double()
            base = answer(pixels)
            for layer, head in np.ndindex(3, 4):

                def zero(_: Any, args: tuple, head: int = head) -> tuple:
                    z = args[0].clone()
                    z[..., 8 * head : 8 * (head + 1)] = 0
                    return (z,)

                handle = layers[layer].register_forward_pre_hook(zero)
                without = answer(pixels)
                handle.remove()
                wanted[layer, head] += float((base.exp() * (base - without)).sum()) / SAMPLES
    atlas = scan(interp.load(module, processor=read), "all")
    assert atlas.scores == ["cls_outlier", "vit_distance", "vit_importance"]
    got = np.asarray(atlas["vit_importance"], float)
    np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=1e-3)
    assert wanted.max() > 1e-4


def test_clusters_of_heads() -> None:
    module = made("registers")
    seen = attentions(module, processor())
    model = interp.load(module, processor=processor())
    inputs = [dict(processor()(images=[p], return_tensors="pt")) for p in pictures()]
    patterns = mean_patterns(model, inputs)
    for layer in range(3):
        own = torch.stack([layers[layer] for layers in seen])[..., 4:, 4:]  # a cell is a patch
        wanted = (own / own.sum(-1, keepdim=True)).mean(0)
        torch.testing.assert_close(patterns[layer].double(), wanted, atol=1e-5, rtol=0)
    frame = interp.vision.cluster_heads(model, samples=2, steps=5)
    assert len(frame) == 12


@pytest.fixture(scope="module", params=["vit classifier", "clip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its image processor."""
    path = tmp_path_factory.mktemp("saved") / "seer"
    made(request.param).save_pretrained(path)
    processor().save_pretrained(path)
    return path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_a_folder_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    options = ["--samples", str(SAMPLES), "--seed", str(SEED), "--out", str(tmp_path / "out")]
    done = run("scan-heads", "--model", str(folder), *options)
    assert done.exit_code == 0, done.output
    atlas = interp.Atlas.load(tmp_path / "out")
    module = interp.load(str(folder)).module
    seen = attentions(module, processor())
    close(atlas, "vit_distance", distances(seen, 4, 4, 1))
    close(atlas, "cls_outlier", outliers(seen, 1))
    assert not atlas.notes and "image processor" not in done.output
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Distance in the picture" in page and "Class token on outliers" in page


def test_own_pictures(folder: Path, tmp_path: Path) -> None:
    for i, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{i}.png")
    model = interp.load(str(folder))
    one, other = scan(model, images=tmp_path), scan(model)
    for score in one.scores:
        close(one, score, np.asarray(other[score], float))
    assert one.frame["vit_distance_stderr"].notna().all()


def test_without_a_processor_it_is_said_how_pictures_are_read(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=lambda *_: ["preprocessor_config.json"])
    model = interp.load(str(bare))
    atlas = scan(model)
    (note,) = atlas.notes
    clip = model.module.config.model_type.startswith("clip")
    assert "without its image processor" in note and "32 × 32" in note
    assert ("0.481" in note) == clip
    colours = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    if clip:
        norm = hf.image_utils
        colours = dict(image_mean=norm.OPENAI_CLIP_MEAN, image_std=norm.OPENAI_CLIP_STD)
    read = hf.ViTImageProcessor(size=dict(height=32, width=32), **colours)
    seen = attentions(model.module, read)
    np.testing.assert_allclose(  # pictures differ by the rounding of resized bytes
        np.asarray(atlas["vit_distance"], float), distances(seen, 4, 4, 1), atol=1e-3
    )


def test_a_broken_processor_is_said_where_it_is_needed(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "preprocessor_config.json").write_text("{", encoding="utf-8")
    model = interp.load(str(broken))
    with model.observe("entropy") as seen:
        model(pixel_values=torch.zeros(1, 3, 32, 32))
    assert seen[0].entropy.shape[1] == 4
    with pytest.raises(InputError, match="image processor of broken can't be loaded"):
        scan(model)


@pytest.mark.parametrize(
    "scores, words",
    [
        ("sink", "sink is measured on text, and .* reads pictures alone; its scores are cls_outl"),
        ("vit_distance,induction", "induction is measured on text"),
        ("image_mass", "image_mass is measured on text"),
        ("ov_copying", "ov_copying is measured on text"),
        ("all,-cls_outlier,-vit_distance,-vit_importance", "None of these scores is of pictures"),
    ],
)
def test_scores_of_text_are_refused_by_name(scores: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        scan(interp.load(made("vit"), processor=processor()), scores)


@pytest.mark.parametrize(
    "given",
    [
        dict(context=64),
        dict(text="a.txt"),
        dict(prompt="what ?"),
        dict(needle="The key is red."),
        dict(inputs=[[1, 2, 3]]),
        dict(extrapolate=True),
    ],
)
def test_settings_of_text_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    if "text" in given:
        given = dict(text=tmp_path / "a.txt")
        given["text"].write_text("words", encoding="utf-8")
    model = interp.load(made("vit"), processor=processor())
    with pytest.raises(InputError, match=f"{next(iter(given))}= is about text"):
        scan(model, **given)


@pytest.mark.parametrize(
    "kind, scores, words",
    [
        ("siglip", "cls_outlier", "can't be measured in .*no class token"),
        ("siglip", "vit_distance,cls_outlier", "can't be measured in .*no class token"),
        ("vit", "vit_importance", "gives none: it is no classifier"),
        ("vit", "vit_distance,vit_importance", "gives none: it is no classifier"),
    ],
)
def test_what_a_model_has_not_is_refused_by_name(kind: str, scores: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        scan(interp.load(made(kind), processor=processor()), scores)


def test_a_model_without_a_grid_is_refused() -> None:
    config = hf.SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[2, 2], image_size=32, window_size=4
    )
    model = interp.load(hf.SwinModel(config).eval(), processor=processor())
    with pytest.raises(InputError, match="can't be measured in"):
        scan(model)


def test_pictures_of_another_size_are_refused() -> None:
    model = interp.load(made("vit"), processor=processor(48, 48))
    with pytest.raises(InputError, match=r"on a picture alone: .*doesn't match"):
        scan(model)


def test_refusals_on_the_command_line(folder: Path) -> None:
    for words, said in [
        (["--scores", "retrieval"], "retrieval is measured on text"),
        (["--context", "64"], "context= is about text"),
        (["--prompt", "what ?"], "prompt= is about text"),
    ]:
        done = run("scan-heads", "--model", str(folder), *words)
        assert done.exit_code == 2 and said in done.output, done.output


def test_a_model_that_wants_both_says_so() -> None:
    text = interp.load("llama").tokenizer
    config = hf.CLIPConfig(
        vision_config=SIZE, text_config={**TEXT, "vocab_size": len(text)}, num_labels=5
    )
    model = interp.load(hf.CLIPModel(config).eval(), tokenizer=text)
    with pytest.raises(InputError, match="does not run on text alone"):
        scan(model, "entropy", context=64)


def test_an_interrupted_scan_resumes(folder: Path, tmp_path: Path) -> None:
    model = interp.load(str(folder))

    def stop(done: int, total: int, what: str) -> None:
        if any((tmp_path / "out").rglob("*0000*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(model, out=tmp_path / "out", progress=stop)
    whole = scan(model, out=tmp_path / "out")
    for score in whole.scores:
        np.testing.assert_array_equal(whole[score], scan(model)[score])
    assert json.loads(json.dumps(whole.provenance["settings"]))["samples"] == SAMPLES
