"""Chosen words: which token predicts them, in the prompt or in the model's caption; weights beside
the eager ones, the first token's too; several pictures; old files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import train_pocket_llava as script
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import interp
from interp import scenes
from interp.errors import InputError
from interp.inputs.words import places, whole_word
from interp.models.names import FOLDER
from interp.results.overlay import Overlay, PictureOverlay, TiledOverlay
from interp.scenes.words import DESCRIBE
from interp.vision.overlay import overlay
from interp.vision.pictures import Pictures
from interp.vision.prompts import with_images
from interp.vision.words import chosen, word_overlays
from interp_hooks import Head, HookedModel, hook
from interp_hooks.conformance import vlm

TOLD = "describe the picture : a red table top left and a blue chair middle right ."
HEADS = [Head(1, 2, "text"), Head(3, 7, "text")]


@pytest.fixture(scope="module")
def model() -> HookedModel:
    processor = script.build_processor()
    module = script.build_model(processor.tokenizer, 0).eval()
    tiny.stir(module)
    return hook(module, name="random llava", processor=processor)


def picture(seed: int = 0) -> Image.Image:
    return scenes.render(scenes.usual(np.random.default_rng(seed)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pictures")
    for n in range(5):
        picture(n).save(place / f"{n}.png")
    return place


def eager(model: HookedModel, inputs: dict) -> torch.Tensor:
    """(layers, heads, queries, keys)."""
    with torch.no_grad():
        out = tiny.eager(model.module)(**inputs, output_attentions=True)
    return torch.stack(out.attentions)[:, 0]


# --- words among tokens


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE that splits everything: several tokens a word, several a letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "a"), ("b", "l"), ("Ġ", "ta"), ("Ġta", "bl")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({w: n for n, w in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("word", ["table", "Écran", "red table", "桌子", "constable"])
def test_places_hold_the_word(bytes_tokenizer: PreTrainedTokenizerBase, word: str) -> None:
    """The tokens found are the fewest whose text holds the word, by trying all."""
    text = "the constable saw a red table, ein écran 大桌子上 and a vegetable Table"
    ids = bytes_tokenizer.encode(text)
    found = places(bytes_tokenizer, ids, whole_word(word))
    wanted = [m.start() for m in re.finditer(whole_word(word), text, re.IGNORECASE)]
    assert len(found) == len(wanted) == (2 if word == "table" else 1)
    ends = [len(text[:n].encode()) for n in range(len(text) + 1)]  # characters → bytes
    sizes = np.cumsum([0, *(len(bytes_tokenizer.convert_ids_to_tokens(i)) for i in ids)])
    for (start, stop), first in zip(found, wanted, strict=True):
        assert sizes[start] <= ends[first] < sizes[start + 1]
        assert sizes[stop - 1] < ends[first + len(word)] <= sizes[stop]


def test_words_are_parted_and_asked_for() -> None:
    assert chosen(" table,chair, table") == ("table", "chair")
    assert chosen(["red table"]) == ("red table",)
    for bad in ("", " , ", [], [3]):
        with pytest.raises(InputError, match="Name the words"):
            chosen(bad)  # type: ignore[arg-type]


# --- overlays


def test_a_word_of_the_prompt(model: HookedModel, folder: Path) -> None:
    made, notes = word_overlays(
        model, Pictures(5, 0, str(folder), TOLD), ("chair", "table", "zebra"), HEADS
    )
    assert [(o.word, o.shown) for o in made] == [
        (w, f"{n}.png") for n in range(4) for w in ("chair", "table")
    ]
    assert len(notes) == 1 and "“zebra” stands neither in the prompt nor" in notes[0]
    inputs = with_images(model, TOLD, [folder / "0.png"])
    weights = eager(model, dict(inputs))
    words = TOLD.split()
    for one in made[:2]:
        row = inputs["input_ids"].shape[1] - len(words) + words.index(one.word) - 1
        assert one.token == words[words.index(one.word) - 1]  # red, blue
        for head in HEADS:
            wanted = weights[head.layer, head.head, row]
            np.testing.assert_allclose(
                np.array(one.maps[str(head)]).ravel(), wanted[1:65], atol=1e-5
            )
            assert one.first[str(head)] == pytest.approx(float(wanted[0]), abs=1e-5)
            assert one.mass[str(head)] == pytest.approx(float(wanted[1:65].sum()), abs=1e-4)


def test_a_word_of_the_models_own_caption(
    model: HookedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens by hand, read again with the prompt; what ends the caption is no part of it."""
    inputs = dict(with_images(model, DESCRIBE, [folder / "0.png"]))
    length = inputs["input_ids"].shape[1]
    ids = inputs["input_ids"]
    twin = tiny.eager(model.module)
    for _ in range(6):
        more = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids))
        with torch.no_grad():
            ids = torch.cat([ids, twin(**more).logits[:, -1:].argmax(-1)], 1)
    said = [model.tokenizer.decode([t]) for t in ids[0, length:].tolist()]
    new = [n for n, w in enumerate(said) if w.isalpha() and w not in (*said[:n], *TOLD.split()[:4])]
    at = new[-1]
    made, notes = word_overlays(model, Pictures(1, 0, str(folder)), (said[at],), HEADS)
    assert not notes and made[0].prompt.startswith(f"{DESCRIBE} {said[0]}")
    whole = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids))
    row = eager(model, whole)[1, 2, length + at - 1]
    np.testing.assert_allclose(
        np.array(made[0].maps["text.L1H2"]).ravel(), row[1:65].numpy(), atol=1e-5
    )
    stop = int(ids[0, length + at])
    monkeypatch.setattr(model.module.generation_config, "eos_token_id", stop)
    made, notes = word_overlays(model, Pictures(1, 0, str(folder)), (said[at],), HEADS)
    assert not made and "says of the picture" in notes[0]


def test_one_of_several_pictures_that_touch(model: HookedModel) -> None:
    pictures = [picture(1), picture(2)]
    prompt = "is there a chair ?"
    weights = eager(model, dict(with_images(model, prompt, pictures)))
    for k in (0, 1, -1):
        made = overlay(model, pictures, prompt, "L1H2", image=k)
        first = 1 + 64 * (k % 2)
        wanted = weights[1, 2, -1, first : first + 64]
        np.testing.assert_allclose(np.array(made.maps["text.L1H2"]).ravel(), wanted, atol=1e-5)
        assert made.mass["text.L1H2"] == pytest.approx(float(wanted.sum()), abs=1e-4)
        assert np.array_equal(np.asarray(made.image()), np.asarray(pictures[k]))
    with pytest.raises(InputError, match="no picture 2 among 2"):
        overlay(model, pictures, prompt, "L1H2", image=2)


def test_several_tiled_pictures_lie_as_each_would_alone() -> None:
    """The tokens of the second of two, found by a mark in it alone, are those of its grids."""
    made = vlm.build("idefics3")
    model = hook(made.module, name="idefics3", processor=made.processor)
    one, two = picture(1).resize((64, 64)), picture(2).resize((96, 48))
    both = overlay(model, [one, two], vlm.PROMPT, "L0H0,L1H3", image=1)
    alone = overlay(model, two, vlm.PROMPT, "L0H0,L1H3")
    assert isinstance(both, TiledOverlay) and isinstance(alone, TiledOverlay)
    assert both.boxes == alone.boxes
    inputs = with_images(model, vlm.PROMPT, [one, two])
    twin, weights = tiny.eager(made.module), []
    path = next(s.path for s in model.sites if s.is_main and s.layer == 1)
    twin.get_submodule(path).register_forward_hook(lambda m, a, out: weights.append(out[1]))
    with torch.no_grad():
        twin(**inputs, output_attentions=True)
    token = made.module.config.image_token_id
    slots = (inputs["input_ids"][0] == token).nonzero().flatten()
    own = int((with_images(model, vlm.PROMPT, [two])["input_ids"] == token).sum())
    row = weights[0][0, 3, -1, slots[-own:]]  # the last tokens are the second picture's
    got = np.concatenate([np.ravel(tile) for tile in both.tiles["text.L1H3"]])
    np.testing.assert_allclose(got, row.numpy(), atol=1e-5)


# --- saved, drawn, scanned


def test_old_files_load_and_new_ones_come_back(model: HookedModel) -> None:
    made = overlay(model, picture(), TOLD, "L0H0,L2H1")
    data = json.loads(json.dumps(made.to_json()))
    assert PictureOverlay.from_json(data) == made and len(made.first) == 2
    old = {k: v for k, v in data.items() if k not in ("first", "word", "shown", "by")}
    read = PictureOverlay.from_json(old)
    assert isinstance(read, Overlay) and read.first == {} and read.maps == made.maps
    mass = 100 * made.mass["text.L0H0"]
    assert read.title("text.L0H0") == f"L0H0 · {mass:.0f} % on the image"
    titles = [note.text for note in made.figure().layout.annotations]
    share = 100 * made.first["text.L0H0"]
    assert f"L0H0 · {mass:.0f} % on the image,<br>{share:.0f} % on the first token" in titles


def test_a_scan_draws_the_words(model: HookedModel, folder: Path, tmp_path: Path) -> None:
    atlas = interp.scan_heads(
        model, "image_mass", 64, 2, images=folder, prompt=TOLD, words=["table", "zebra"],
        out=tmp_path, progress=False,
    )  # fmt: skip
    assert [(o.word, o.shown) for o in atlas.overlays] == [("table", "0.png"), ("table", "1.png")]
    assert any("“zebra”" in note for note in atlas.notes)
    again = interp.Atlas.load(tmp_path)
    assert again.provenance["settings"]["words"] == ["table", "zebra"]
    assert again.overlays == atlas.overlays and {o.by for o in again.overlays} == {"Image mass"}
    page = again.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Where heads look for “table”, 1.png" in page and "from which the model goes" in page
    assert "the heads that are highest in image mass" in page


def test_words_that_cannot_be_drawn(model: HookedModel, folder: Path) -> None:
    with pytest.raises(InputError, match="scan for gaze, image_excess or image_mass too"):
        interp.plan_scan(model, "cls_outlier", 64, 1, words="table")
    with pytest.raises(InputError, match="takes no images"):
        interp.plan_scan(interp.load("llama"), "sink", 64, 1, words="table")
    made = vlm.build("idefics2")
    other = hook(made.module, name="idefics2", processor=made.processor)
    drawn, notes = word_overlays(
        other, Pictures(1, 0, str(folder)), ("picture",), [Head(0, 0, other.main_tower)]
    )
    assert not drawn and "0.png is not drawn" in notes[0] and "resamples" in notes[0]


def test_pocket_llavas_own_words() -> None:
    """Its tokenizer gives each word of a caption back at its own token."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "pocket_llava")
    words = TOLD.split()
    ids = tokenizer.encode(TOLD, add_special_tokens=False)
    for word in ("table", "chair", "middle"):
        assert places(tokenizer, ids, whole_word(word)) == [
            (words.index(word), words.index(word) + 1)
        ]
