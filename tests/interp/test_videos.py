"""Videos are pictures too: their tokens are found, told from images and sounds, and taken out;
images that touch are told apart."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_vision
import torch
from tiny_vision import IMAGE, pixels

import interp
from interp import vision
from interp.edits import ScaleTokens, vhr_for
from interp.errors import InputError
from interp.vision.divergence import t_vhd, vhd
from interp_hooks import HookedModel, hook
from interp_hooks.errors import TapError
from interp_hooks.huggingface.images import image_mask, image_spans, video_token

VIDEO, START, END = 98, 97, 96
Mixed = tuple[HookedModel, Any, dict[str, torch.Tensor]]


def kinds(ids: torch.Tensor) -> torch.Tensor:
    return torch.where(ids == VIDEO, 2, (ids == IMAGE).int()).int()


def prompt(ids: list[int]) -> dict[str, torch.Tensor]:
    row = torch.tensor([ids])
    return dict(input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=kinds(row))


def mixed(name: str) -> Mixed:
    """A Qwen-VL, its untapped twin, and a prompt: a video of 2 × 4 tokens, then an image of 4."""
    module, given = tiny_vision.build(name)
    clip = [VIDEO] * 8 if name != "qwen3_vl" else [*[VIDEO] * 4, END, START, *[VIDEO] * 4]
    ids = [1, START, *clip, END, 3, START, *[IMAGE] * 4, END, 20, 21, 22]
    both = prompt(ids)
    both.update(
        pixel_values=given["pixel_values"],
        image_grid_thw=given["image_grid_thw"],
        pixel_values_videos=pixels(32, 3 * 2 * 16),
        video_grid_thw=torch.tensor([[2, 4, 4]]),
    )
    return hook(module, sample=given, name=name), tiny.eager(module), both


QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("name", QWEN)
def test_video_tokens_are_the_pictures(name: str) -> None:
    model, _, both = mixed(name)
    ids = both["input_ids"]
    wanted = ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 1].tolist()
    assert image_mask(model.module.config, ids)[0].nonzero().flatten().tolist() == wanted  # type: ignore[index]
    (spans,) = vision.spans(model, both)
    assert [k for a, b in spans for k in range(a, b)] == wanted
    assert len(spans) == (3 if name == "qwen3_vl" else 2)
    with torch.no_grad():
        with model.edit(ScaleTokens("image", 3.0)):
            named = model(**both).logits
        with model.edit(ScaleTokens((ids == IMAGE) | (ids == VIDEO), 3.0)):
            listed = model(**both).logits
        assert torch.equal(named, listed)


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("without", ["all", "images", "videos"])
def test_divergence_without_either(name: str, without: str) -> None:
    """‖a(with) − a(without)‖ from what W_O reads in an untapped twin that is given the prompt
    written by hand."""
    model, twin, both = mixed(name)
    ids = both["input_ids"][0].tolist()
    gone = dict(all=(IMAGE, VIDEO), images=(IMAGE,), videos=(VIDEO,))[without]
    bare = prompt([t for t in ids if t not in gone])
    if without == "images":
        bare.update({k: both[k] for k in ("pixel_values_videos", "video_grid_thw")})
    if without == "videos":
        bare.update({k: both[k] for k in ("pixel_values", "image_grid_thw")})
    left = vision.without_images(model, both, without)
    assert left.keys() == bare.keys()
    assert all(torch.equal(left[k], bare[k]) for k in bare)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    layers = [twin.get_submodule(s.path) for s in model.sites if s.is_main]
    handles = [
        m.o_proj.register_forward_pre_hook(lambda _, a, i=i: seen[i].append(a[0][:, -1]))
        for i, m in enumerate(layers)
    ]
    with torch.no_grad():
        twin(**both)
        twin(**bare)
    for handle in handles:
        handle.remove()
    found = vhd(model, both, without)
    for layer, (a, b) in seen.items():
        wanted = (a - b).double().view(1, 4, -1).norm(dim=-1)
        torch.testing.assert_close(found[layer].double(), wanted, atol=1e-4, rtol=1e-4)
    assert t_vhd(model, both, 2, without=without).curve.shape == (1, 2)
    assert vhr_for(model, both, without=without).heads


@pytest.mark.parametrize("of", [vhd, t_vhd, vhr_for])
def test_which_is_taken_out_must_be_said(of: Any) -> None:
    model, _, both = mixed("qwen2_vl")
    with pytest.raises(InputError, match="images and videos"):
        of(model, both)
    with pytest.raises(InputError, match="'sounds'"):
        of(model, both, without="sounds")
    blind = {k: v for k, v in both.items() if "video" not in k}
    with pytest.raises(InputError, match="pixel_values_videos"):
        of(model, blind, without="all")


@pytest.mark.parametrize("name", QWEN)
def test_a_video_alone(name: str) -> None:
    model, _, both = mixed(name)
    ids = both["input_ids"][0].tolist()
    only = prompt([t for t in ids if t != IMAGE])
    only.update({k: both[k] for k in ("pixel_values_videos", "video_grid_thw")})
    assert float(vhd(model, only)[1].min()) > 0
    with pytest.raises(InputError, match="no image"):
        vision.without_images(model, only, "images")
    with pytest.raises(InputError, match="no video"):
        vision.without_images(model, prompt([1, START, *[IMAGE] * 4, END, 3]), "videos")


def test_touching_images_are_told_by_their_grids() -> None:
    model, _, _ = mixed("qwen2_vl")
    config = model.module.config
    ids = torch.tensor([[0, 0, 1, *[IMAGE] * 6, 5], [1, *[IMAGE] * 4, 7, *[IMAGE] * 2, 8, 9]])
    given = dict(
        input_ids=ids, image_grid_thw=torch.tensor([[1, 4, 4], [1, 2, 4], [1, 4, 4], [1, 2, 4]])
    )
    assert vision.spans(model, given) == [[(3, 7), (7, 9)], [(1, 5), (6, 8)]]
    for wrong in ([[1, 4, 4]], [[1, 4, 4]] * 4):
        with pytest.raises(InputError, match="image tokens"):
            vision.spans(model, {**given, "image_grid_thw": torch.tensor(wrong)})
    assert [len(s) for s in image_spans(config, ids)] == [1, 2]  # ids alone


def test_touching_images_of_any_size_without_a_word_are_refused() -> None:
    module, given = tiny_vision.build("llava_next")
    model = hook(module, sample=given)
    one = given["input_ids"]
    n = int((one == IMAGE).sum())
    two = dict(
        input_ids=torch.tensor([[1, *[IMAGE] * 2 * n, 5]]), image_sizes=torch.tensor([[16, 32]] * 2)
    )
    with pytest.raises(InputError, match="touch"):
        vision.spans(model, two)
    apart = dict(two, input_ids=torch.tensor([[1, *[IMAGE] * n, 6, *[IMAGE] * n, 5]]))
    assert [len(s) for s in vision.spans(model, apart)] == [2]


@pytest.mark.parametrize("strategy", ["full", "default"])
def test_touching_images_of_a_tower_without_class_token(strategy: str) -> None:
    """SigLIP has no class token: "full" has 16 tokens of 4 × 4 patches, "default" drops a patch."""
    import transformers as hf

    config = hf.LlavaConfig(
        vision_config=hf.SiglipVisionConfig(**tiny_vision.VISION),
        text_config=hf.LlamaConfig(**tiny_vision.TEXT),
        image_token_index=IMAGE,
        vision_feature_select_strategy=strategy,
    )
    n = 16 if strategy == "full" else 15
    ids = torch.tensor([[1, *[IMAGE] * 2 * n, 5]])
    assert image_spans(config, ids) == [[(1, 1 + n), (1 + n, 1 + 2 * n)]]
    module = hf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        module(input_ids=ids, pixel_values=pixels(2, 3, 16, 16))


def test_sounds_are_no_pictures() -> None:
    """The audio token of an omni model is none of the image's; sounds stay when pictures go."""

    class Config:
        model_type = "omni"

        class thinker_config:
            image_token_id, video_token_id, audio_token_id = 10, 11, 12
            vision_config = object()

    ids = torch.tensor([[1, 10, 11, 12, 5]])
    assert image_mask(Config, ids).tolist() == [[False, True, True, False, False]]  # type: ignore[union-attr]
    assert video_token(Config) == 11
    model, _, both = mixed("qwen2_vl")
    heard = dict(both, input_features=torch.zeros(1, 4, 8), feature_attention_mask=torch.ones(1, 8))
    left = vision.without_images(model, heard)
    assert {"input_features", "feature_attention_mask"} <= left.keys()
    assert not any("pixel" in k or "grid" in k for k in left)


def test_a_text_model_has_none() -> None:
    with pytest.raises(TapError, match="takes no images"):
        image_spans(interp.load("llama").module.config, torch.tensor([[1, 2]]))
