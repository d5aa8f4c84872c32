"""Gaze and image retrieval: eager weights in float64 and brute force; planted heads; tiles; folders
without a known truth; who is drawn."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import train_pocket_llava as script
from tokenizers import AddedToken

import interp
from interp import scenes, scores
from interp.cli.scan_heads import of_pictures
from interp.edits import ScaleTokens
from interp.errors import InputError
from interp.probes import catalogue as probes
from interp.probes.settings import Settings
from interp.scenes.words import DESCRIBE
from interp.scores.gaze import auc
from interp.vision.prompts import with_images
from interp.vision.token_grids import token_grids
from interp_hooks import HookedModel, hook
from interp_hooks.conformance import vlm

SETTINGS = Settings(samples=2, seed=2)
SIDE = 8  # patches a side of pocket-llava, its image at slots 1 … 64


@pytest.fixture(scope="module")
def model() -> HookedModel:
    processor = script.build_processor()
    module = script.build_model(processor.tokenizer, 0).eval()
    tiny.stir(module)
    return hook(module, name="random llava", processor=processor)


def scene(number: int) -> scenes.Scene:
    return scenes.usual(np.random.default_rng([SETTINGS.seed, number]))


def lies_on(thing: scenes.Thing, x: float, y: float) -> bool:
    return int(3 * x) == thing.column and int(3 * y) == thing.row


def gold_of(thing: scenes.Thing) -> list[int]:
    """Slots of the thing's patches in an 8 × 8 grid after <s>."""
    return [
        1 + SIDE * r + c
        for r, c in itertools.product(range(SIDE), range(SIDE))
        if lies_on(thing, (c + 0.5) / SIDE, (r + 0.5) / SIDE)
    ]


def eager_weights(module: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """(layers, batch, heads, queries, keys) float64 of a copy that was never tapped."""
    twin = tiny.eager(module).double()
    given = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        return torch.stack(twin(**given, output_attentions=True).attentions)


def brute(gold: np.ndarray, others: np.ndarray) -> float:
    pairs = [(g > o) + 0.5 * (g == o) for g in gold for o in others]
    return float(np.mean(pairs))


def measured(model: HookedModel, name: str, stage: str = "before", *edits: Any) -> np.ndarray:
    """(samples, layers, heads) of a score on the probe's batches."""
    score, probe = scores.get(name), probes.get(scores.get(name).probe)
    found = []
    for batch in probe.make(model, SETTINGS):
        layers: list[torch.Tensor] = []

        def note(stats: Any, batch: Any = batch, layers: list[torch.Tensor] = layers) -> None:
            if stats.site.is_main:
                layers.append(score.measure(stats, batch)[0])

        with torch.no_grad(), model.edit(*(e(batch) for e in edits)):
            if stage == "before":
                probe.run(model, batch, score.ask(batch), note)
            else:
                with model.watch(score.ask(batch), note, stage="after"):
                    model(input_ids=batch.input_ids, **batch.extra)
        found.append(torch.stack(layers).double().numpy())
    return np.stack(found)


def test_gaze_is_the_auc_of_eager_weights(model: HookedModel) -> None:
    found = measured(model, "gaze")
    for number, values in enumerate(found):
        told = scenes.caption(scene(number))
        inputs = with_images(model, f"{DESCRIBE} {told}", [scenes.render(scene(number))])
        weights = eager_weights(model.module, dict(inputs)).numpy()[:, 0]
        words = told.split()
        start = inputs["input_ids"].shape[1] - len(words)  # a token a word
        wanted = np.zeros(values.shape)
        for thing in scene(number).things:
            row = weights[:, :, start + words.index(thing.name) - 1]  # (layers, heads, keys)
            gold = gold_of(thing)
            others = [k for k in range(1, 1 + SIDE**2) if k not in gold]
            for layer, head in np.ndindex(values.shape):
                here = row[layer, head]
                wanted[layer, head] += brute(here[gold], here[others]) / len(scene(number).things)
        np.testing.assert_allclose(values, wanted, atol=2e-3)  # neighbours of float32 may swap


def test_image_retrieval_is_its_formula_on_eager_weights(model: HookedModel) -> None:
    found = measured(model, "image_retrieval")
    for number, (values, batch) in enumerate(
        zip(found, probes.get("asked").make(model, SETTINGS), strict=True)
    ):
        read = model.tokenizer.decode(batch.input_ids[0])
        (thing,) = [t for t in scene(number).things if f"is there a {t.name} ?" in read]
        rows = []
        for text in (f"is there a {thing.name} ?", "is there a N/A ?"):
            inputs = with_images(model, text, [scenes.render(scene(number))])
            weights = eager_weights(model.module, dict(inputs))[:, 0]
            mass = weights[:, :, 1 + SIDE**2 :].mean(2)[..., gold_of(thing)]
            least = mass.mean(-1, keepdim=True) - 2 * mass.std(-1, keepdim=True)
            rows.append((mass * (mass >= least)).sum(-1))
        np.testing.assert_allclose(values, (rows[0] - rows[1]).numpy(), atol=1e-5)


def test_planted_heads_look_at_the_thing(model: HookedModel) -> None:
    """All weight of each row on its own thing's patches: 1. Keys that are all alike: .5."""

    def only(n: int) -> Any:
        def edit(batch: Any) -> ScaleTokens:
            mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
            look = batch.info["looked"][n]
            mask[0, look.gold] = True
            batch.info["looked"] = [look]
            return ScaleTokens(mask, gain=1e9)

        return edit

    np.testing.assert_array_equal(measured(model, "gaze", "after", only(0)), 1.0)
    queries = [m for n, m in model.module.named_modules() if n.endswith("self_attn.q_proj")]
    handles = [m.register_forward_hook(lambda m, a, out: torch.zeros_like(out)) for m in queries]
    try:
        np.testing.assert_array_equal(measured(model, "gaze"), 0.5)
    finally:
        for handle in handles:
            handle.remove()


def test_auc_counts_ties_by_half() -> None:
    rng = np.random.default_rng(0)
    gold, others = rng.integers(0, 4, (5, 7)) / 4, rng.integers(0, 4, (5, 11)) / 4
    found = auc(torch.from_numpy(gold), torch.from_numpy(others))
    np.testing.assert_allclose(found, [brute(g, o) for g, o in zip(gold, others, strict=True)])


@pytest.mark.parametrize(
    "family", ["llava_next", "idefics3", "qwen2_vl", "pixtral", "internvl", "gemma3"]
)
def test_all_grids_of_a_layout_count(family: str) -> None:
    """Gold patches in tiles and the small copy, against the untapped model's eager weights."""
    made = vlm.build(family)
    tokenizer = made.processor.tokenizer
    tokenizer.add_tokens([AddedToken(w, single_word=True) for w in scenes.words.WORDS])
    model = hook(made.module, name=family, processor=made.processor)
    (batch, *_), seen = probes.get("named").make(model, SETTINGS), []
    told = scene(0)
    prompt, picture = DESCRIBE, scenes.render(told)
    grids = token_grids(model, with_images(model, prompt, [picture]), prompt, picture)
    middles = [
        (
            int(slot),
            grid.box[0] + (c + 0.5) / grid.slots.shape[1] * (grid.box[2] - grid.box[0]),
            grid.box[1] + (r + 0.5) / grid.slots.shape[0] * (grid.box[3] - grid.box[1]),
        )
        for grid in grids
        for (r, c), slot in np.ndenumerate(grid.slots.numpy())
    ]
    wanted = {}
    for thing in told.things:
        gold = {slot for slot, x, y in middles if lies_on(thing, x, y)}
        if gold:
            wanted[thing.name] = gold, {slot for slot, _, _ in middles} - gold
    assert {
        tokenizer.decode(list(look.word)): (set(look.gold.tolist()), set(look.others.tolist()))
        for look in batch.info["looked"]
    } == wanted
    ids = batch.input_ids[0]
    for look in batch.info["looked"]:
        (row,) = look.rows
        assert tokenizer.decode(ids[row + 1 : row + 2]).strip() == tokenizer.decode(list(look.word))
    score = scores.get("gaze")

    def note(stats: Any) -> None:
        if stats.site.is_main and stats.site.layer == 1:
            seen.append(score.measure(stats, batch)[0])

    with torch.no_grad():
        probes.get("named").run(model, batch, score.ask(batch), note)
    twin = tiny.eager(made.module)
    given = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.extra)
    path = next(s.path for s in model.sites if s.is_main and s.layer == 1)
    weights: list[torch.Tensor] = []
    twin.get_submodule(path).register_forward_hook(lambda m, a, out: weights.append(out[1]))
    with torch.no_grad():
        twin(**{k: v for k, v in given.items() if v is not None}, output_attentions=True)
    aucs = [
        [brute(w[list(gold)].numpy(), w[list(others)].numpy()) for w in weights[0][0, :, row]]
        for (gold, others), look in zip(wanted.values(), batch.info["looked"], strict=True)
        for row in look.rows
    ]
    np.testing.assert_allclose(seen[0], np.mean(aucs, 0), atol=5e-3)


def test_a_folder_has_no_truth(model: HookedModel, tmp_path: Path) -> None:
    scenes.render(scene(0)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"gaze needs to know where things lie.*leave images="):
        interp.plan_scan(model, "gaze,image_mass", 64, 1, images=tmp_path)
    plan = interp.plan_scan(model, "default,-retrieval", 64, 1, images=tmp_path)
    assert sum("gaze, image_retrieval: left out, for where each" in n for n in plan.notes) == 1
    assert not {"gaze", "image_retrieval"} & {s.name for s in plan.scores}  # no empty columns
    assert "--scores vhd,image_mass,image_excess" in str(of_pictures(plan, tmp_path))
    assert of_pictures(plan, None) is None


def test_resampled_pictures_have_no_gaze() -> None:
    made = vlm.build("idefics2")
    model = hook(made.module, name="idefics2", processor=made.processor)
    with pytest.raises(InputError, match="resamples its picture"):
        interp.plan_scan(model, "gaze", 32, 1)


def test_scanned_drawn_and_told_how_sure_the_model_is(model: HookedModel) -> None:
    atlas = interp.scan_heads(model, "gaze,image_mass,image_retrieval", 64, 2, 2, progress=False)
    wanted = measured(model, "gaze")[:2].mean(0)
    text = atlas.frame[atlas.frame.tower == "text"]
    np.testing.assert_allclose(
        text.pivot(index="layer", columns="head", values="gaze"), wanted, atol=1e-6
    )
    assert text["image_retrieval"].notna().all()
    best = [str(h) for h, _, _ in atlas.head_ranking("gaze", 7, "text")]
    assert atlas.overlays[0].heads == best
    assert any(note.startswith("named things: the model itself") for note in atlas.notes)
