"""DAMRO, RITUAL and CCA against two branches, and rings, made by hand with an untouched eager
model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_vision
import torch
from seeing import HOW, NEW, alone, generated, llava, pictures, prompts
from test_vision_edits import IMAGE, class_weights

import interp
from interp.edits import ScaleHeads
from interp.edits.fit_paint import paint_for
from interp.errors import EditError, InputError
from interp.procedures import CCA, DAMRO, RITUAL, ImageGuidance, RITUALPlus
from interp.procedures.ritual_plus import ASK
from interp.procedures.transforms import TRANSFORMS, transformed
from interp.vision.prompts import with_images, without_images
from interp_hooks import hook


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def joined(own: torch.Tensor, other: torch.Tensor, a: float, b: float, beta: float) -> torch.Tensor:
    """a·own + b·other in float64, −∞ where own < max own + ln β."""
    made = a * own.double() + b * other.double()
    return torch.where(own >= own.max() + math.log(beta), made, -torch.inf) if beta else made


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal, but for −∞ at scores that are at the bound."""
    finite = torch.isfinite(found) & torch.isfinite(wanted)
    assert int((torch.isfinite(found) != torch.isfinite(wanted)).sum()) <= 1 and bool(finite.any())
    torch.testing.assert_close(
        found[finite].double(), wanted[finite].double(), atol=1e-3, rtol=1e-3
    )


def outlier_patches(twin: Any, pixels: torch.Tensor, k: int) -> list[int]:
    return sorted(np.argsort(-class_weights(twin, pixels)[-1])[:k].tolist())


@torch.no_grad()
def outlier_logits(twin: Any, given: Any, k: int, new: list[int]) -> torch.Tensor:
    """(vocabulary,) after the prompt and new tokens, with k patches *in place of* the image's, all
    read anew."""
    ids, pixels = given["input_ids"][0].tolist(), given["pixel_values"]
    first = ids.index(IMAGE)
    features = twin.get_image_features(pixel_values=pixels).pooler_output[0][
        outlier_patches(twin, pixels, k)
    ]
    embed = twin.get_input_embeddings()
    before, after = (embed(torch.tensor(part)) for part in (ids[:first], ids[first + 64 :] + new))
    return twin(inputs_embeds=torch.cat([before, features, after])[None], use_cache=False).logits[
        0, -1
    ]


@torch.no_grad()
def own_logits(twin: Any, given: Any, new: list[int]) -> torch.Tensor:
    ids = torch.cat([given["input_ids"], torch.tensor([new], dtype=torch.long)], 1)
    return twin(input_ids=ids, pixel_values=given["pixel_values"], use_cache=False).logits[0, -1]


@pytest.mark.parametrize("settings", [dict(), dict(alpha=0.5, k=4, beta=0.0)], ids=str)
@pytest.mark.parametrize("how", ["greedy", "sampling"])
def test_damro_is_two_branches_step_by_step(how: str, settings: dict[str, Any]) -> None:
    model, twin = llava()
    inputs = prompts()
    damro = DAMRO(model, inputs, **settings)
    found = generated(inputs, how, logits_processor=[damro])
    alpha, k, beta = (
        settings.get(name, default) for name, default in (("alpha", 2.0), ("k", 10), ("beta", 0.1))
    )
    for row, new, _, scores in found:
        assert scores is not None
        given = alone(inputs, row)
        for step in range(NEW):
            own, other = (
                own_logits(twin, given, new[:step]),
                outlier_logits(twin, given, k, new[:step]),
            )
            close(scores[step], joined(own, other, 1 + alpha, -alpha, beta))
            if how == "greedy":
                assert int(scores[step].argmax()) == new[step]
    again = generated(inputs, how, logits_processor=[damro])  # the same processor, another text
    assert [f[1] for f in again] == [f[1] for f in found]


def test_damro_presets() -> None:
    """By the code, one softmax of the full width; patches are the image's, k of them in each."""
    model, twin = llava()
    inputs = prompts()
    heads, width = DAMRO(model, inputs, k=5), DAMRO(model, inputs, k=5, preset="code")
    for row in range(2):
        first = int((inputs["input_ids"][row] == IMAGE).nonzero()[0])
        best = outlier_patches(twin, inputs["pixel_values"][row : row + 1], 5)
        assert heads.outliers[row].nonzero().flatten().tolist() == [first + p for p in best]
        assert int(width.outliers[row].sum()) == 5
    assert not torch.equal(heads.outliers, width.outliers)


@pytest.mark.parametrize("given_images", [False, True], ids=["read back", "given"])
@pytest.mark.parametrize("how", ["greedy", "sampling"])
def test_ritual_is_two_branches_step_by_step(how: str, given_images: bool) -> None:
    model, twin = llava()
    inputs = prompts()
    ritual = RITUAL(
        model, inputs, pictures() if given_images else None, transforms=["horizontal_flip"]
    )
    for row, new, _, scores in generated(inputs, how, logits_processor=[ritual]):
        assert scores is not None
        given = alone(inputs, row)
        mirrored = dict(given, pixel_values=given["pixel_values"].flip(-1))
        for step in range(NEW):
            own, other = own_logits(twin, given, new[:step]), own_logits(twin, mirrored, new[:step])
            close(scores[step], joined(own, other, 1, 3, 0.1))


@torch.no_grad()
def words_logits(twin: Any, given: Any, new: list[int]) -> torch.Tensor:
    """(vocabulary,) after the prompt without its image's tokens and new tokens, all read anew."""
    ids = [t for t in given["input_ids"][0].tolist() if t != IMAGE] + new
    return twin(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("settings", [dict(), dict(gamma=1.1, beta=0.0)], ids=str)
@pytest.mark.parametrize("how", ["greedy", "sampling"])
def test_image_guidance_is_two_branches_step_by_step(how: str, settings: dict[str, Any]) -> None:
    """PAI's code works with log-probabilities, which differ by a number a row; under PAINT's edits
    the second branch is unedited."""
    model, twin = llava()
    inputs = prompts()
    gamma, beta = settings.get("gamma", 2.0), settings.get("beta", 0.1)
    guidance = ImageGuidance(model, inputs, **settings)
    for row, new, _, scores in generated(inputs, how, logits_processor=[guidance]):
        assert scores is not None
        given = alone(inputs, row)
        for step in range(NEW):
            own = own_logits(twin, given, new[:step]).double().log_softmax(-1)
            other = words_logits(twin, given, new[:step]).double().log_softmax(-1)
            assert float((own - other).abs().max()) > 0.1  # the image matters
            wanted = gamma * (own - other) + other
            if beta:
                wanted = wanted.masked_fill(own < own.max() + math.log(beta), -torch.inf)
            close(scores[step].log_softmax(-1), wanted.log_softmax(-1))
    edits = paint_for(model, inputs, 5.0)
    found = generated(inputs, how, model.edit(*edits), logits_processor=[guidance])
    for row, _, logits, scores in found:
        assert scores is not None
        given = alone(inputs, row)
        with torch.no_grad(), model.edit(*paint_for(model, given, 5.0)):
            own = model(**given).logits[0, -1]
        assert float((own - own_logits(twin, given, [])).abs().max()) > 1e-2
        torch.testing.assert_close(logits[0], own, atol=3e-4, rtol=3e-4)
        other = words_logits(twin, given, [])
        close(scores[0], joined(own, other, gamma, 1 - gamma, beta))


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "paligemma"])
def test_image_guidance_of_other_families(name: str) -> None:
    """The second prediction is the prompt of words alone, at its positions, whatever positions an
    image has."""
    module, given = tiny_vision.build(name)
    model = hook(module, sample=given, name=name)
    guidance = ImageGuidance(model, given, beta=0.0)
    ids = given["input_ids"]
    found = [guidance(ids, torch.zeros(1, module.get_output_embeddings().weight.shape[0]))]
    ids = torch.cat([ids, torch.tensor([[7]])], 1)
    found.append(guidance(ids, torch.zeros_like(found[0])))
    words = without_images(model, given)["input_ids"]
    for text, scores in zip(
        (words, torch.cat([words, torch.tensor([[7]])], 1)), found, strict=True
    ):
        wanted = module(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, -1]
        torch.testing.assert_close(-scores[0], wanted, atol=1e-3, rtol=1e-3)


def test_ritual_draws_with_a_seed() -> None:
    model, _ = llava()
    inputs = prompts(["a", "b", "c", "d", "e", "f", "g", "h"])
    one, two, other = (RITUAL(model, inputs, seed=s).complements for s in (0, 0, 1))
    assert [k for k, _ in one] == [k for k, _ in two] and len({k for k, _ in one}) > 2
    assert all(a.tobytes() == b.tobytes() for (_, a), (_, b) in zip(one, two, strict=True))
    assert [k for k, _ in one] != [k for k, _ in other] or any(
        a.tobytes() != b.tobytes() for (_, a), (_, b) in zip(one, other, strict=True)
    )


@torch.no_grad()
def test_ritual_plus_takes_the_name_that_the_model_prefers() -> None:
    """Every name after every question, each in an eager forward of its own."""
    model, twin = llava()
    questions = ["is there a table ?", "is there a chair and a big red ball ?"]
    inputs = prompts(questions)
    kinds = ["vertical_flip", "crop", "gaussian_blur"]
    names = ["vertical flip", "crop", "gaussian blur"]
    plus = RITUALPlus(model, inputs, pictures(), transforms=kinds, questions=questions)
    drawn = RITUAL(model, inputs, pictures(), transforms=kinds)
    for row, question in enumerate(questions):
        ask = ASK.format(question=question, names="vertical flip, crop, gaussian blur")
        asked = with_images(model, [ask], [pictures()[row]])
        scores = []
        for name in names:
            tokens = model.tokenizer.encode(" " + name, add_special_tokens=False)
            ids = torch.cat([asked["input_ids"], torch.tensor([tokens])], 1)
            out = twin(input_ids=ids, pixel_values=asked["pixel_values"], use_cache=False)
            p = out.logits[0, -len(tokens) - 1 : -1].double().log_softmax(-1)
            scores.append(float(p[range(len(tokens)), tokens].mean()))
        np.testing.assert_allclose(plus.preferences[row], scores, atol=2e-3)
        best = kinds[int(np.argmax(scores))]
        kind, picture = plus.complements[row]
        assert kind == best
        rng = np.random.default_rng([0, row])
        rng.integers(3)
        assert picture.tobytes() == transformed(pictures()[row], best, rng).tobytes()
        if drawn.complements[row][0] == best:
            assert drawn.complements[row][1].tobytes() == picture.tobytes()
    assert {kind for kind, _ in plus.complements} <= set(kinds)
    one = dict(transforms=["horizontal_flip"])
    texts = [
        generated(inputs, "greedy", logits_processor=[kind(model, inputs, **one)])
        for kind in (RITUAL, RITUALPlus)
    ]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(*texts, strict=True))
    with pytest.raises(InputError, match="1 questions"):
        RITUALPlus(model, inputs, questions=["one ?"])
    assert RITUALPlus(model, inputs).preferences.shape == (2, 6)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transformations_keep_the_size(kind: str) -> None:
    picture = pictures(1)[0].resize((60, 40))
    before = np.asarray(picture).astype(float)
    made = [transformed(picture, kind, np.random.default_rng(seed)) for seed in range(4)]
    assert all(m.size == (60, 40) and m.mode == "RGB" for m in made)
    after = [np.asarray(m).astype(float) for m in made]
    assert all(np.abs(a - before).max() > 1 for a in after)
    if kind.endswith("flip"):
        axis = 1 if kind == "horizontal_flip" else 0
        assert all(np.array_equal(a, np.flip(before, axis)) for a in after)
    else:
        assert not np.array_equal(after[0], after[1])
    if kind == "gaussian_blur":
        assert all(
            np.abs(np.diff(a, axis=0)).mean() < np.abs(np.diff(before, axis=0)).mean()
            for a in after
        )
    if kind in (
        "gaussian_blur",
        "color_jitter",
    ):  # each pixel by itself, or by its neighbours: no geometry
        assert abs(after[0].mean() / max(before.mean(), 1) - 1) < 2


def rings_by_hand(rows: int, columns: int) -> list[int]:
    """Peel a grid: the border's cells get 0, then what is left has a border of its own."""
    ring, cells = {}, {(r, c) for r in range(rows) for c in range(columns)}
    number = 0
    while cells:
        top, bottom = min(r for r, _ in cells), max(r for r, _ in cells)
        left, right = min(c for _, c in cells), max(c for _, c in cells)
        border = {(r, c) for r, c in cells if r in (top, bottom) or c in (left, right)}
        ring.update(dict.fromkeys(border, number))
        cells -= border
        number += 1
    return [ring[r, c] for r in range(rows) for c in range(columns)]


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (5, 5), (3, 7), (1, 4), (1, 1)])
def test_rings(grid: tuple[int, int]) -> None:
    found = CCA(grid=grid).rings(grid[0] * grid[1])
    assert found.tolist() == rings_by_hand(*grid)
    assert int(found.max()) + 1 == math.ceil(min(grid) / 2)
    if grid[0] == grid[1]:
        assert torch.equal(CCA().rings(grid[0] ** 2), found)


def layout_by_hand(ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """(positions, visible (tokens, tokens)) of a row of tokens whose images have 8 × 8 patches."""
    ring, places, owner, at, i = rings_by_hand(8, 8), [], [], 0, 0
    while i < len(ids):
        if ids[i] == IMAGE:
            places += [at + r for r in ring]
            owner += [i] * 64
            at, i = at + 4, i + 64
        else:
            places.append(at)
            owner.append(-1)
            at, i = at + 1, i + 1
    n = len(ids)
    sees = torch.ones(n, n, dtype=torch.bool).tril()
    for q in range(n):
        for k in range(n):
            if owner[q] >= 0 and owner[q] == owner[k]:
                sees[q, k] = places[k] <= places[q]
    return places, sees


@torch.no_grad()
def logits_by_hand(twin: Any, given: Any, new: list[int], mask: bool) -> torch.Tensor:
    """(tokens, vocabulary) of the prompt and new tokens in one eager forward."""
    ids = given["input_ids"][0].tolist() + new
    places, sees = layout_by_hand(ids)
    sees = sees if mask else torch.ones_like(sees).tril()
    bias = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None]
    return twin(
        input_ids=torch.tensor([ids]),
        pixel_values=given["pixel_values"],
        position_ids=torch.tensor([places]),
        attention_mask=bias,
        use_cache=False,
    ).logits[0]


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "positions alone"])
@pytest.mark.parametrize("how", HOW)
def test_cca_generates_as_explicit_positions_and_mask_say(how: str, mask: bool) -> None:
    model, twin = llava()
    inputs, cca = prompts(), CCA(mask)
    for row, new, logits, _ in generated(inputs, how, cca.on(model)):
        given = alone(inputs, row)
        wanted = logits_by_hand(twin, given, new, mask)[-NEW - 1 : -1]
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=2e-4)
    assert model.observers_and_edits() == ([], []) and not model.module._forward_pre_hooks


@torch.no_grad()
def test_cca_of_a_prompt_with_several_images() -> None:
    """No mask and no positions given; what is not in the block is the model's own."""
    model, twin = llava()
    inputs = with_images(model, "<image> and <image> what is there ?", pictures())
    places, _ = layout_by_hand(inputs["input_ids"][0].tolist())
    assert CCA().positions(model, inputs)[0].tolist() == places
    given = {k: v for k, v in inputs.items() if k != "attention_mask"}
    untouched = model(**given).logits
    for mask in (True, False):
        with CCA(mask).on(model):
            found = model(**given, use_cache=False).logits[0]
            with model.clean():
                assert torch.allclose(model(**given).logits, untouched, atol=1e-5)
        torch.testing.assert_close(
            found, logits_by_hand(twin, inputs, [], mask), atol=2e-4, rtol=2e-4
        )
        assert float((found - untouched[0]).abs().max()) > 1e-2
    assert torch.equal(model(**given).logits, untouched)


@torch.no_grad()
def test_cca_leaves_text_alone_and_pads_on_either_side() -> None:
    model, _ = llava()
    words = torch.tensor([[1, 6, 7, 8, 9]])
    wanted = model(input_ids=words).logits
    with CCA().on(model):
        torch.testing.assert_close(model(input_ids=words).logits, wanted, atol=1e-5, rtol=1e-5)
        inputs = prompts()
        left = model(**inputs).logits
        pads = int((inputs["attention_mask"][0] == 0).sum())
        pads, row = (pads, 0) if pads else (int((inputs["attention_mask"][1] == 0).sum()), 1)
        moved = {k: v.clone() for k, v in inputs.items()}
        for name in ("input_ids", "attention_mask"):
            moved[name][row] = moved[name][row].roll(-pads)
        right = model(**moved).logits
    assert pads > 0
    torch.testing.assert_close(right[row, :-pads], left[row, pads:], atol=1e-4, rtol=1e-4)


# --- beams, identities, other edits
# -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", [DAMRO, RITUAL, ImageGuidance])
def test_rows_that_beams_move_are_followed(kind: Any) -> None:
    model, _ = llava()
    inputs = prompts()
    follow, fresh = kind(model, inputs, beta=0.0), kind(model, inputs, beta=0.0)
    ids = inputs["input_ids"].repeat_interleave(3, 0)
    vocabulary = model.module.get_output_embeddings().weight.shape[0]
    own = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(0))
    follow(ids, own)
    steps = [
        ([0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]),
        ([2, 2, 0, 3, 5, 4], [11, 12, 13, 14, 15, 16]),
        ([1, 0, 1, 5, 5, 3], [9, 8, 7, 6, 5, 9]),
    ]
    for order, tokens in steps:
        ids = torch.cat([ids[torch.tensor(order)], torch.tensor(tokens)[:, None]], 1)
        found = follow(ids, own)
    for row in range(6):  # each text alone, from its start
        text = ids[row : row + 1]
        mine = alone(inputs, row // 3)
        other = kind(
            model, mine, beta=0.0, **(dict(transforms=["vertical_flip"]) if kind is RITUAL else {})
        )
        if kind is RITUAL:
            part = slice(row // 3, row // 3 + 1)
            assert fresh.branch is not None and other.branch is not None
            other.branch.more["pixel_values"] = fresh.branch.more["pixel_values"][part]
        for end in range(mine["input_ids"].shape[1], mine["input_ids"].shape[1] + 4):
            wanted = other(
                torch.cat([mine["input_ids"], text[:, -3:]], 1)[:, :end], own[row : row + 1]
            )
        torch.testing.assert_close(found[row], wanted[0], atol=1e-3, rtol=1e-3)
    scores = own.log_softmax(-1)  # beam search gives log-probabilities
    assert torch.allclose(
        fresh(inputs["input_ids"].repeat_interleave(3, 0), scores).logsumexp(-1),
        torch.zeros(6),
        atol=1e-4,
    )
    assert len(generated(inputs, "beams", logits_processor=[kind(model, inputs)])) == 4


@pytest.mark.parametrize("how", HOW)
def test_identity_settings_are_bit_equal(how: str) -> None:
    model, _ = llava()
    inputs = prompts()
    wanted = generated(inputs, how)
    for processor in (
        DAMRO(model, inputs, alpha=0, beta=0),
        RITUAL(model, inputs, kappa=0, beta=0),
        ImageGuidance(model, inputs, gamma=1, beta=0),
    ):
        found = generated(inputs, how, logits_processor=[processor])
        for (_, a, x, p), (_, b, y, q) in zip(found, wanted, strict=True):
            assert a == b and torch.equal(x, y) and (p is q is None or torch.equal(p, q))


def test_edits_and_observers_around_are_of_the_own_prediction() -> None:
    """The second branch is the untouched model; "image" keys and statistics are those of the own
    one."""
    model, twin = llava()
    inputs = prompts()
    edit = interp.edits.ScaleTokens("image", 0.3)
    gone = ScaleHeads({"1.2": 0.0})
    with model.observe("entropy") as seen:
        found = generated(
            inputs, "greedy", model.edit(edit, gone), logits_processor=[DAMRO(model, inputs)]
        )
    assert seen[0].entropy.shape[2] == inputs["input_ids"].shape[1] + NEW - 1
    for row, new, logits, scores in found:
        assert scores is not None
        given = alone(inputs, row)
        for step in range(NEW):
            ids = torch.cat([given["input_ids"], torch.tensor([new[:step]], dtype=torch.long)], 1)
            with torch.no_grad(), model.edit(edit, gone):
                own = model(input_ids=ids, pixel_values=given["pixel_values"]).logits[0, -1]
            torch.testing.assert_close(logits[step], own, atol=3e-4, rtol=3e-4)
            close(
                scores[step], joined(own, outlier_logits(twin, given, 10, new[:step]), 3, -2, 0.1)
            )
    assert model.observers_and_edits() == ([], [])


def test_cca_goes_with_edits_and_damro() -> None:
    model, twin = llava()
    inputs = prompts()
    with CCA().on(model):
        found = generated(inputs, "greedy", logits_processor=[DAMRO(model, inputs)])
    for row, new, logits, scores in found:
        assert scores is not None
        given = alone(inputs, row)
        own = logits_by_hand(twin, given, new, True)[-NEW - 1 : -1]
        torch.testing.assert_close(logits, own, atol=3e-4, rtol=3e-4)
        close(scores[2], joined(own[2], outlier_logits(twin, given, 10, new[:2]), 3, -2, 0.1))


# --- what can't be done
# -------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model, _ = llava()
    inputs = prompts()
    text = hook(tiny.build("llama"), name="tiny-llama")
    words: Any = dict(without_images(model, inputs), pixel_values=inputs["pixel_values"])
    right = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    for kind in (DAMRO, RITUAL, ImageGuidance):
        for given, who, says in (
            (inputs, text, "takes no images"),
            (words, model, "has none"),
            (right, model, "pad on the left"),
        ):
            with pytest.raises(InputError, match=says):
                kind(who, given)
        with pytest.raises(InputError, match="β of"):
            kind(model, inputs, beta=1.5)
        processor = kind(model, inputs)
        scores = torch.zeros(2, 40)
        with pytest.raises(InputError, match="another prompt"):
            processor(inputs["input_ids"].flip(0), scores)
        with pytest.raises(InputError, match="token by token"):
            processor(torch.cat([inputs["input_ids"]] * 2, 1), scores)
        generated(inputs, "greedy", logits_processor=[processor])
        with pytest.raises(InputError, match=r"token by token|another text"):
            processor(torch.nn.functional.pad(inputs["input_ids"], (0, NEW), value=6), scores)
    for bad in (dict(k=0), dict(k=65), dict(alpha=-1), dict(preset="book"), dict(layer=9)):
        with pytest.raises(InputError):
            DAMRO(model, inputs, **bad)  # type: ignore[arg-type]
    for worse in (
        dict(kappa=-1),
        dict(transforms=["blur"]),
        dict(transforms=[]),
        dict(images=pictures(1)),
        dict(images=["no.png"]),
    ):
        with pytest.raises(InputError):
            RITUAL(model, inputs, **worse)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="takes no images"), CCA().on(text):
        pass
    with pytest.raises(EditError, match="grid"):
        CCA(grid=(0, 3))
    with torch.no_grad(), CCA(grid=(4, 4)).on(model), pytest.raises(InputError, match="4 × 4"):
        model(**inputs)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with CCA().on(model), pytest.raises(InputError, match="in its block"):
            model(input_ids=torch.tensor([[5], [5]]), past_key_values=cache)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "paligemma"])
def test_other_families_are_refused_by_name(name: str) -> None:
    module, given = tiny_vision.build(name)
    model = hook(module, sample=given, name=name)
    with pytest.raises(
        InputError, match=f"one token a patch in the prompt, as in LLaVA-1.5, which {name}"
    ):
        DAMRO(model, given, k=2)
    with pytest.raises(InputError, match="processor"):
        RITUAL(model, given)
    if name == "paligemma":
        return
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=r"one position id|one token a patch"),
        CCA().on(model),
    ):
        model(**given)


def test_by_name() -> None:
    assert [interp.procedures.get(n) for n in ("damro", "ritual", "cca")] == [DAMRO, RITUAL, CCA]
