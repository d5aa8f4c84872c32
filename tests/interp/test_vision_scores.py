"""Scores of pictures against eager attention; sinks that were planted; padding; refusals; a whole
scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import train_pocket_llava as pocket
from test_scores import Forwards, NoSquare
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import interp
from interp import scores
from interp.errors import InputError
from interp.probes.catalogue import registry
from interp.probes.image import image_batch
from interp.probes.probe import ProbeBatch
from interp.probes.settings import Settings
from interp.scan.plan import Plan
from interp.scan.run import plan_scan
from interp.scan.work import Scan
from interp.scenes import render, usual
from interp.scenes.words import DESCRIBE
from interp.scores.cls_outlier import feature_layer
from interp.vision.divergence import t_vhd, vhd
from interp.vision.patches import PatchGrid, by_sample, patch_grid
from interp.vision.prompts import with_images
from interp.vision.tower_patterns import autoencode, cluster_heads, kmeans, mean_patterns
from interp_hooks import HookedModel, hook

Pair = tuple[HookedModel, Any]
TEXTS = ["describe the picture : a red table top left .", "is there a chair ?"]
IMAGE_SCORES = [
    "image_mass",
    "image_excess",
    "visual_sink",
    "visual_nonsink_ratio",
    "image_centric",
    "cls_outlier",
    "vit_distance",
]
SINK_SCORES = ["visual_sink", "visual_nonsink_ratio", "image_centric"]
MASSIVE, PLANTED = 7, (5, 20, 33)  # a dimension, and image tokens of a prompt without padding


def picture(seed: int) -> Any:
    return render(usual(np.random.default_rng(seed)))


def sharpened(module: Any) -> Any:
    """Heads that differ: larger queries and keys."""
    tiny.stir(module.eval())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(6)
    return module


def build(name: str, width: int, layers: int, seed: int, side: int = 48, limit: int = 512) -> Pair:
    """A LLaVA of pocket-llava's words and pictures: text of `layers` × 4 heads, vision of 3 layers
    × 2 heads."""
    processor = pocket.build_processor()
    processor.image_processor.size = dict(height=side, width=side)
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=limit,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        initializer_range=0.8 * width**-0.5,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=side,
        patch_size=6,
    )
    module = sharpened(
        LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
        )
    )
    return hook(module, name=name, tokenizer=processor.tokenizer, processor=processor), tiny.eager(
        module
    )


@pytest.fixture(scope="module")
def llava() -> Pair:
    return build("tiny-llava", 64, 2, seed=1)


@pytest.fixture(scope="module")
def wide() -> Pair:
    """A stream of 512 dimensions, wide enough for φ = 20."""
    return build("wide-llava", 512, 3, seed=2)


@contextmanager
def planted(
    modules: Sequence[Any], slots: Sequence[Sequence[int]], layer: int = 1
) -> Iterator[None]:
    """Massive activations on entry of `layer` in the slots of each row; they stay in the stream."""

    def write(module: Any, args: tuple, kwargs: dict) -> Any:
        stream = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone()
        for row, here in enumerate(slots[: len(stream)]):
            stream[row, [k for k in here if k < stream.shape[1]], MASSIVE] = 500.0
        return (
            (args, {**kwargs, "hidden_states": stream})
            if "hidden_states" in kwargs
            else ((stream, *args[1:]), kwargs)
        )

    blocks = [m.model.language_model.layers[layer] for m in modules]
    handles = [b.register_forward_pre_hook(write, with_kwargs=True) for b in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batch_of_two(model: HookedModel) -> tuple[ProbeBatch, list[dict[str, torch.Tensor]]]:
    """A left-padded batch, and its prompts one by one."""
    given = with_images(model, TEXTS, [picture(0), picture(1)])
    assert not bool(given["attention_mask"].all())
    return image_batch(model, given), [
        with_images(model, t, [picture(i)]) for i, t in enumerate(TEXTS)
    ]


def measured(model: HookedModel, name: str, batch: ProbeBatch) -> np.ndarray:
    """(samples, layers, heads) of a score on a batch."""
    score = scores.get(name)
    plan = Scan(model, [score], Settings(32, 1))
    frame = pd.DataFrame(plan._probe("image", [score], batch, 0))
    frame = frame[~frame.score.str.startswith("_")]  # the probe's own outcome
    assert set(frame.tower) == {score.tower or "text"} and set(frame.score) == {name}
    frame = frame.sort_values(["sample", "layer", "head"])
    return frame.value.to_numpy().reshape(frame["sample"].nunique(), frame.layer.nunique(), -1)


@torch.no_grad()
def text_attention(
    plain: Any, given: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A (layers, heads, queries, keys) of one prompt; which keys are the image's; the first word
    after it."""
    out = plain(**given, output_attentions=True, use_cache=False)
    image = given["input_ids"][0] == plain.config.image_token_id
    return (
        torch.stack([a[0].double() for a in out.attentions]),
        image,
        int(image.nonzero().max()) + 1,
    )


@torch.no_grad()
def vision_attention(plain: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    out = plain.model.vision_tower(given["pixel_values"], output_attentions=True)
    return torch.stack([a[0].double() for a in out.attentions])


# --- attention on the image, and its sinks
# ------------------------------------------------------------------------


def test_image_mass_is_its_definition_under_left_padding(llava: Pair) -> None:
    model, plain = llava
    batch, alone = batch_of_two(model)
    wanted = []
    for given in alone:
        a, image, after = text_attention(plain, given)
        wanted.append(a[:, :, after:, image].sum(-1).mean(-1).numpy())
    got = measured(model, "image_mass", batch)
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    assert got.std() > 0.01


def test_image_excess_is_what_an_even_head_would_not_give(llava: Pair) -> None:
    model, plain = llava
    batch, alone = batch_of_two(model)
    wanted = []
    for given in alone:
        a, image, after = text_attention(plain, given)
        n = len(image)
        s = image.double().cumsum(0) / torch.arange(1, n + 1)  # of the keys that a row sees
        m = a[:, :, after:, image].sum(-1)
        wanted.append(((m - s[after:]) / (1 - s[after:])).mean(-1).numpy())
    got = measured(model, "image_excess", batch)
    np.testing.assert_allclose(got, wanted, atol=2e-4)
    assert got.std() > 0.01 and got.max() <= 1


def test_an_even_head_does_not_look_at_the_image(llava: Pair) -> None:
    """Its mass is large in a prompt of image tokens nearly alone, and is no reason for a role."""
    model, _ = llava
    batch = image_batch(model, with_images(model, DESCRIBE, [picture(0)]))
    q = model.module.model.language_model.layers[0].self_attn.q_proj.weight
    kept = q.detach().clone()
    try:
        with torch.no_grad():
            q.zero_()
        mass, excess = (measured(model, n, batch)[0, 0] for n in ("image_mass", "image_excess"))
        atlas = interp.scan_heads(model, "image_mass,image_excess", 64, 1, progress=False)
    finally:
        with torch.no_grad():
            q.copy_(kept)
    assert mass.min() > 0.8
    np.testing.assert_allclose(excess, 0, atol=1e-5)
    assert not any(atlas.card(f"text.L0H{h}").roles for h in range(4))


def sink_definition(
    name: str, a: torch.Tensor, image: torch.Tensor, sinks: torch.Tensor, after: int
) -> torch.Tensor:
    """(heads,) from one layer's A (heads, queries, keys)."""
    on_image = a[:, after:, image].sum(-1)
    on_sinks = a[:, after:, image & sinks].sum(-1)
    ratio = (on_image - on_sinks) / on_image
    if name == "visual_sink":
        return on_sinks.sum(-1) / on_image.sum(-1)
    return (
        ratio.nanmean(-1)
        if name == "visual_nonsink_ratio"
        else ((on_image >= 0.2) & (ratio >= 0.8)).double().mean(-1)
    )


@pytest.mark.parametrize("name", SINK_SCORES)
def test_planted_sinks_are_found(wide: Pair, name: str) -> None:
    model, plain = wide
    batch, alone = batch_of_two(model)
    starts = batch.attention_mask.argmax(1).tolist()
    slots = [
        [start + k for k in (0, *PLANTED)] for start in starts
    ]  # the first token, and image tokens
    with planted([model.module], slots):
        got = measured(model, name, batch)
    assert np.isnan(got[:, 0]).all()  # nothing is massive on entry of layer 0
    wanted = []
    with planted([plain], [[0, *PLANTED]]):
        for given in alone:
            a, image, after = text_attention(plain, given)
            sinks = torch.zeros_like(image)
            sinks[list(PLANTED)] = True
            wanted.append(
                [sink_definition(name, a[layer], image, sinks, after).numpy() for layer in (1, 2)]
            )
    np.testing.assert_allclose(got[:, 1:], wanted, atol=3e-5)
    assert got[:, 1:].std() > 0.001


def test_a_sink_of_another_dimension_does_not_count(wide: Pair) -> None:
    """Image tokens are sinks by what is massive at the first token, not by any outlier of
    theirs."""
    model, _ = wide
    batch = image_batch(model, with_images(model, DESCRIBE, [picture(0)]))
    with planted([model.module], [PLANTED]):
        assert np.isnan(measured(model, "visual_sink", batch)).all()
    with planted([model.module], [[0]]):  # the text has a sink, the image none
        assert (measured(model, "visual_sink", batch)[:, 1:] == 0).all()


def test_without_sinks_a_note_says_so(llava: Pair, tmp_path: Path) -> None:
    atlas = interp.scan_heads(llava[0], ["image_mass", *SINK_SCORES], 32, 1, progress=False)
    for name in SINK_SCORES:
        assert atlas[name].mask.all() and atlas[name].shape == (2, 4)
        assert (
            sum(n.startswith(f"{name}: not measured") and "RMS(x)" in n for n in atlas.notes) == 1
        )
    page = atlas.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("Not measured in any head.") == len(SINK_SCORES)
    assert not any("image_mass" in note for note in atlas.notes)


# --- the vision tower
# ---------------------------------------------------------------------------------------------


def test_cls_outlier_is_its_definition(llava: Pair) -> None:
    model, plain = llava
    batch, alone = batch_of_two(model)
    wanted = []
    for given in alone:
        cls = vision_attention(plain, given)[:, :, 0, 1:]  # (layers, heads, patches)
        outliers = cls[1].mean(0).topk(10).indices  # layer −2 of 3 is what the language model sees
        wanted.append((cls[..., outliers].sum(-1) / cls.sum(-1)).numpy())
    np.testing.assert_allclose(measured(model, "cls_outlier", batch), wanted, atol=2e-5)
    layers = [
        feature_layer(LlavaConfig(vision_feature_layer=n), 4) for n in (-1, -2, 1, 4, [-3, -2])
    ]
    assert layers == [3, 2, 0, 3, 2]


def test_vit_distance_is_its_definition(llava: Pair) -> None:
    model, plain = llava
    batch, alone = batch_of_two(model)
    place = np.array([(i // 8, i % 8) for i in range(64)], float)
    far = torch.from_numpy(np.sqrt(((place[:, None] - place[None]) ** 2).sum(-1)))
    wanted = []
    for given in alone:
        a = vision_attention(plain, given)[:, :, 1:, 1:]
        wanted.append(((a * far).sum(-1) / a.sum(-1)).mean(-1).numpy())
    got = measured(model, "vit_distance", batch)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert 0 < got.min() < got.max() < 7 * 2**0.5


def test_grids() -> None:
    config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=48, patch_size=6))
    assert patch_grid(config, 65) == PatchGrid(8, 8, True)
    assert patch_grid(config, 64) == PatchGrid(8, 8, False)
    assert patch_grid(config, 66) is None and patch_grid(LlamaConfig(), 64) is None
    assert PatchGrid(8, 8, True).cells(4).tolist()[:9] == [-1, 0, 0, 1, 1, 2, 2, 3, 3]
    tiles = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    assert by_sample(tiles, 2).tolist() == [[2.0], [6.0]]
    assert by_sample(tiles, 3).isnan().all()


def test_vit_importance_is_its_definition(llava: Pair) -> None:
    model, plain = llava
    settings = Settings(32, 2, 3)
    atlas = interp.scan_heads(model, "vit_importance", 32, 2, 3, progress=False)
    wanted = np.zeros((3, 2))
    layers = [
        m for name, m in plain.model.vision_tower.named_modules() if name.endswith("out_proj")
    ]
    for given in settings.pictures.inputs(model):
        base = next_word(plain, given)
        for layer in range(3):
            for head in range(2):

                def zero(module: Any, args: tuple, head: int = head) -> tuple:
                    z = args[0].clone()
                    z[..., 16 * head : 16 * (head + 1)] = 0
                    return (z,)

                handle = layers[layer].register_forward_pre_hook(zero)
                pruned = next_word(plain, given)
                handle.remove()
                wanted[layer, head] += float((base.exp() * (base - pruned)).sum()) / 2
    np.testing.assert_allclose(
        np.asarray(atlas["vit_importance"], float), wanted, atol=1e-6, rtol=1e-3
    )
    assert (wanted[:2] > 0).all() and not wanted[2].any()  # the last layer's output is not used
    assert atlas.top("vit_importance", 1)[0].tower == "vision"


@torch.no_grad()
def next_word(plain: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return plain(**given).logits[0, -1].double().log_softmax(-1)


@torch.no_grad()
def last_z(plain: Any, heads: int = 4, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """z (layers, heads, d) at the last position of one prompt, and the logits there."""
    z: list[torch.Tensor] = []

    def read(module: Any, args: tuple) -> None:
        z.append(args[0][0, -1].double().view(heads, -1))

    handles = [
        m.o_proj.register_forward_pre_hook(read) for m in tiny.layers(plain.model.language_model)
    ]
    logits = plain(**given).logits[0, -1]
    for handle in handles:
        handle.remove()
    return torch.stack(z), logits


def divergence(
    plain: Any, given: dict[str, torch.Tensor], said: Sequence[int] = ()
) -> tuple[torch.Tensor, int]:
    """(layers, heads) by hand, after the words `said`, and the next word with the image."""
    ids = torch.cat([given["input_ids"], torch.tensor([list(said)], dtype=torch.long)], 1)
    words = ids[:, ids[0] != plain.config.image_token_id]
    a, logits = last_z(plain, input_ids=ids, pixel_values=given["pixel_values"])
    b, _ = last_z(plain, input_ids=words)
    return (a - b).norm(dim=-1), int(logits.argmax())


def test_vhd_is_its_definition_under_left_padding(llava: Pair) -> None:
    model, plain = llava
    both = with_images(model, TEXTS, [picture(0), picture(1)])
    found = vhd(model, both)
    for i, text in enumerate(TEXTS):
        wanted, _ = divergence(plain, with_images(model, text, [picture(i)]))
        np.testing.assert_allclose(
            torch.stack([found[n][i] for n in range(2)]), wanted, rtol=1e-4, atol=1e-5
        )
    atlas = interp.scan_heads(model, "vhd", 32, 2, 5, progress=False)
    by_hand = torch.stack(
        [divergence(plain, given)[0] for given in Settings(32, 2, 5).pictures.inputs(model)]
    )
    np.testing.assert_allclose(
        np.asarray(atlas["vhd"], float), by_hand.mean(0), rtol=1e-4, atol=1e-5
    )
    assert [str(h)[:5] for h in atlas.top("vhd", 3)] == ["text."] * 3


@pytest.mark.parametrize("cached", [True, False])
def test_t_vhd_is_its_definition(
    llava: Pair, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = llava
    if not cached:
        monkeypatch.setattr(HookedModel, "has_cache", False)
    both = with_images(model, TEXTS, [picture(0), picture(1)])
    found = t_vhd(model, both, max_new_tokens=4, k=3)
    for i, text in enumerate(TEXTS):
        given = with_images(model, text, [picture(i)])
        said: list[int] = []
        for step in range(found.tokens.shape[1]):
            if 2 in said:  # it has ended
                assert torch.isnan(found.curve[i, step])
                continue
            values, word = divergence(plain, given, said)
            assert word == int(found.tokens[i, step])
            wanted = values.sort(-1, descending=True).values[:, :3].sum()
            np.testing.assert_allclose(float(found.curve[i, step]), float(wanted), rtol=1e-4)
            said.append(word)
    assert t_vhd(model, both, 1).k == 2  # half of the heads


def test_t_vhd_ends_with_the_answer(llava: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llava
    both = with_images(model, TEXTS, [picture(0), picture(1)])
    free = t_vhd(model, both, 3)
    assert free.tokens[0, 0] != free.tokens[1, 0]
    ends = free.tokens[:, 0].tolist()
    monkeypatch.setattr(model.module.generation_config, "eos_token_id", ends[0])
    cut = t_vhd(model, both, 3)
    assert torch.isfinite(cut.curve[0, 0]) and (
        cut.curve.shape[1] == 1 or torch.isnan(cut.curve[0, 1:]).all()
    )
    monkeypatch.setattr(model.module.generation_config, "eos_token_id", ends)
    assert t_vhd(model, both, 3).curve.shape == (2, 1)


def test_bad_calls_are_refused(llava: Pair, worded: Callable[[str], Any]) -> None:
    model, _ = llava
    given = with_images(model, DESCRIBE, [picture(0)])
    for bad in (dict(k=0), dict(k=5), dict(max_new_tokens=0)):
        with pytest.raises(InputError, match="top 1 to 4 heads"):
            t_vhd(model, given, **bad)
    text = model.tokenizer(DESCRIBE, return_tensors="pt")
    with pytest.raises(InputError, match="has none"):
        vhd(model, dict(text))
    other = worded("llama")[0]
    for run in (
        lambda: t_vhd(other, given),
        lambda: vhd(other, given),
        lambda: cluster_heads(other),
    ):
        with pytest.raises(InputError, match="takes no images"):
            run()
    with pytest.raises(InputError, match="1 to 6 clusters"):
        cluster_heads(model, samples=1, clusters=7)


# --- clusters of patterns
# -----------------------------------------------------------------------------------------


def test_patterns_are_attention_between_cells(llava: Pair) -> None:
    model, plain = llava
    given = Settings(samples=2, seed=1).pictures.inputs(model)
    found = mean_patterns(model, given)
    cell = torch.tensor([(i // 8) // 2 * 4 + (i % 8) // 2 for i in range(64)])
    wanted = torch.zeros(3, 2, 16, 16, dtype=torch.float64)
    for one in given:
        a = vision_attention(plain, one)[:, :, 1:, 1:]
        for i in range(16):
            rows = torch.stack(
                [a[:, :, cell == i][..., cell == j].sum((-1, -2)) for j in range(16)], -1
            )
            wanted[:, :, i] += rows / rows.sum(-1, keepdim=True) / len(given)
    np.testing.assert_allclose(torch.stack([found[n] for n in range(3)]), wanted, atol=1e-5)


def test_clusters_are_kinds_and_repeat(llava: Pair) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.rand(3, 256, generator=generator)
    true = np.array([0] * 9 + [1] * 6 + [2] * 5)
    shares = kinds[torch.from_numpy(true)] + 0.1 * torch.rand(20, 256, generator=generator)
    codes, made = autoencode(shares, seed=0, steps=300)
    assert (made - shares).abs().mean() < 0.5 * (shares - shares.mean(0)).abs().mean()
    assert kmeans(codes.double().numpy(), 3, 0).tolist() == true.tolist()  # numbered by size
    model, _ = llava
    before = torch.random.get_rng_state()
    one, two = (cluster_heads(model, samples=2, clusters=3, seed=4, steps=50) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert len(one) == 6 and set(one.tower) == {"vision"} and sorted(set(one.cluster)) == [0, 1, 2]
    assert one.cluster.value_counts().sort_index().is_monotonic_decreasing
    np.testing.assert_allclose(np.array(one.attrs["patterns"]).sum(-1), 1, atol=1e-5)


def test_text_models_are_refused_by_name_and_spared_by_default(
    worded: Callable[[str], Any], tmp_path: Path
) -> None:
    model = worded("llama")[0]
    for name in (n for n in scores.names() if scores.get(n).needs_images):
        with pytest.raises(
            InputError, match=f"The score {name} needs a vision-language model.*takes no images"
        ):
            plan_scan(model, ["sink", name], 48)
    for which in ("default", "all"):
        assert not any(s.needs_images for s in plan_scan(model, which, 48, 1).scores)
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="takes no images"):
        plan_scan(model, "default", 48, images=tmp_path)


def test_a_default_scan_has_both_towers(llava: Pair, tmp_path: Path) -> None:
    model = llava[0]
    calls: list[tuple[int, int]] = []
    plan = plan_scan(model, "default", 48, 2)
    atlas = plan.run(tmp_path, lambda done, total, label: calls.append((done, total)))
    assert (
        set(IMAGE_SCORES) | {"vhd", "sink"} <= set(atlas.scores)
        and "vit_importance" not in atlas.scores
    )
    assert calls[-1][0] == calls[-1][1] and all(done < total for done, total in calls[:-1])
    assert calls == sorted(calls)
    assert any(
        "image_mass" in measured and passes.endswith(" × 2") for _, measured, passes in plan.rows
    )
    assert any(measured == "vhd" for _, measured, _ in plan.rows)
    frame = atlas.frame
    text, vision = frame[frame.tower == "text"], frame[frame.tower == "vision"]
    assert (len(text), len(vision)) == (8, 6)
    for name in ("sink", "entropy", "vhd", "image_mass"):
        assert text[name].notna().all() and vision[name].isna().all()
    for name in ("cls_outlier", "vit_distance"):
        assert vision[name].notna().all() and text[name].isna().all()
    assert any(
        "unknown to this tokenizer" in note for note in atlas.notes
    )  # prose is not about tables and chairs
    again = interp.Atlas.load(tmp_path)
    pd.testing.assert_frame_equal(again.frame, frame)
    assert again["cls_outlier"].shape == (3, 2) and again["vhd"].shape == (2, 4)
    page = again.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert '"panels":["vision tower","text tower"]' in page
    assert "vision" in again.plot("vit_distance").layout.title.text
    assert "vision.L" in page and "text.L5H1 is head 1 of layer 5 of the text tower" in page


def test_scores_of_text_leave_the_vision_tower_out(llava: Pair) -> None:
    frame = interp.scan_heads(
        llava[0], ["residual_peak", "importance"], 32, 1, progress=False
    ).frame
    vision = frame[frame.tower == "vision"]
    assert vision[["residual_peak", "importance"]].isna().all(axis=None)
    assert frame[frame.tower == "text"][["residual_peak", "importance"]].notna().all(axis=None)


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_interrupted_scan_resumes(
    llava: Pair, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "_gathers_evidence", False)  # runs of its own, at the end
    model = llava[0]
    what = ["sink", "image_mass", "cls_outlier", "vhd"]

    def interrupt(done: int, total: int, label: str) -> None:
        calls.append(label)
        if len(calls) > stop_after:
            raise KeyboardInterrupt

    calls: list[str] = []
    counter = Forwards(model.module)
    wanted = plan_scan(model, what, 32, 2).run(None).frame
    first, second = plan_scan(model, what, 32, 2), plan_scan(model, what, 32, 2)
    with pytest.raises(KeyboardInterrupt):
        first.run(tmp_path, interrupt)
    results = []
    rest = counter.during(lambda: results.append(second.run(tmp_path)))
    counter.stop()
    pd.testing.assert_frame_equal(results[0].frame, wanted, check_exact=True)
    assert (
        rest == sum([1, 1, 1, 1, 4][stop_after:]) + 1
    )  # text, pictures, vhd with and without; an overlay at the end


def test_pictures_of_ones_own(llava: Pair, tmp_path: Path) -> None:
    model, plain = llava
    for i in range(3):
        picture(i).resize((60 + i, 40)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture", encoding="utf-8")
    asked = dict(images=tmp_path, prompt="is there a chair ?", progress=False)
    atlas = interp.scan_heads(model, ["image_mass", "vhd"], 32, 2, **asked)
    wanted = []
    for i in range(2):
        a, image, after = text_attention(
            plain, with_images(model, "is there a chair ?", [tmp_path / f"{i}.png"])
        )
        wanted.append(a[:, :, after:, image].sum(-1).mean(-1).numpy())
    np.testing.assert_allclose(
        np.asarray(atlas["image_mass"], float), np.mean(wanted, 0), atol=2e-5
    )
    settings = atlas.provenance["settings"]
    assert (settings["images"], settings["prompt"]) == (str(tmp_path), "is there a chair ?")
    picture(9).save(tmp_path / "0.png")
    other = interp.scan_heads(model, "vhd", 32, 2, **asked)
    assert other.provenance["inputs_hash"] != atlas.provenance["inputs_hash"]
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        with pytest.raises(InputError, match="folder"):
            plan_scan(model, "vhd", 32, images=tmp_path / place)


def test_a_model_without_its_processor_keeps_its_text_scores(llava: Pair) -> None:
    model = llava[0]
    bare = hook(model.module, name="bare", tokenizer=model.tokenizer, processor=model.processor)
    bare.processor = None
    atlas = interp.scan_heads(bare, ["sink", "image_mass", "vhd"], 32, 1, progress=False)
    assert atlas["sink"].count() == 8 and atlas["vhd"].count() == 0
    assert [n.split(":")[0] for n in atlas.notes if "processor" in n] == ["image_mass", "vhd"]
    with pytest.raises(InputError, match="without its processor"):
        plan_scan(bare, ["vhd"], 32, 1)


def test_a_scan_of_pictures_makes_no_square_tensor() -> None:
    """1024 patches: a head's matrix has more numbers than any activation."""
    model, _ = build("fine", 32, 1, 0, side=192, limit=2048)
    plan = plan_scan(model, [*IMAGE_SCORES, "vhd"], 64, 1)
    assert registry.get("image").make(model, plan.settings)[0].info["image"].sum() == 1024
    with NoSquare(1024 * 1024) as watch:
        plan.run(None)
    assert watch.largest > 1024
    given = plan.settings.pictures.inputs(model)
    with torch.no_grad(), NoSquare(1024 * 1024):
        mean_patterns(model, given)
