"""`model.attention` and `model.look` against eager attentions, and the page in a browser."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import seeing
import tiny
import torch
from prompts import hooked_transformer

import interp
from interp.edits import Ablate, ScaleTokens, SoftplusReweight
from interp.errors import ContextError, HeadError, InputError, OutputError, TapError
from interp.inputs.pieces import pieces
from interp.inputs.text import content
from interp.look import Look
from interp.look.measure import kept
from interp.report.look_page import packed, render
from interp_hooks import Question, WeightRows

IDS = torch.arange(3, 33)[None] * 7 % 101


def loaded(name: str) -> tuple[Any, Any]:
    module = tiny.build(name)
    return interp.load(module), tiny.eager(module)


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_attention_is_the_eager_one(name: str) -> None:
    model, plain = loaded(name)
    wanted = torch.stack(tiny.attentions(plain, input_ids=IDS)[0])[:, 0].float()
    torch.testing.assert_close(model.attention(IDS), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.attention(IDS, "L1H2"), wanted[1, 2], atol=1e-5, rtol=1e-4)
    some = model.attention(IDS, ["L1H3", (0, 1), "L1H0"])
    torch.testing.assert_close(
        some, torch.stack([wanted[1, 3], wanted[0, 1], wanted[1, 0]]), atol=1e-5, rtol=1e-4
    )


def test_a_layer_that_is_skipped_has_nothing_to_see(monkeypatch: Any) -> None:
    model, _ = loaded("llama")
    skipped = model.module.model.layers[1]
    monkeypatch.setattr(skipped, "forward", lambda hidden, *args, **kwargs: hidden)
    with pytest.raises(TapError, match="without calling the attention of layer 1"):
        model.look(IDS, "L1H0")
    assert model.look(IDS, "L0H0").head == "L0H0"


@pytest.mark.parametrize("at_once", [1, 64, 400])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_few_rows_at_a_time_are_the_same(name: str, at_once: int) -> None:
    model, plain = loaded(name)
    wanted = [a.float() for a in tiny.attentions(plain, input_ids=IDS)[0]]
    parts: dict[int, list[torch.Tensor]] = {}

    def take(call: Any, start: int, a: torch.Tensor) -> None:
        rows = parts.setdefault(call.site.layer, [])
        assert start == sum(r.shape[2] for r in rows)
        assert a[0, 0].numel() <= max(at_once, IDS.shape[1])
        rows.append(torch.nn.functional.pad(a, (0, IDS.shape[1] - a.shape[-1])))

    with model.watch(Question(weights=WeightRows(take, (2, 0), at_once)), lambda stats: None):
        model.logits(IDS)
    for layer, rows in parts.items():
        torch.testing.assert_close(
            torch.cat(rows, 2), wanted[layer][:, [2, 0]], atol=1e-5, rtol=1e-4
        )


def test_transformer_lens_shows_its_pattern() -> None:
    module = hooked_transformer(tiny.build("gpt2"))
    model = interp.load(module)
    _, cache = module.run_with_cache(IDS)
    wanted = torch.stack([cache[f"blocks.{n}.attn.hook_pattern"][0] for n in range(2)])
    torch.testing.assert_close(model.attention(IDS), wanted, atol=1e-6, rtol=1e-4)
    assert len(model.look(IDS, "L1H1")) == IDS.shape[1]


@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
def test_a_look_is_what_the_weights_say(name: str) -> None:
    """Every array of a view from the dense weights and values, in float64."""
    model, plain = loaded(name)
    layer, head = 1, 3
    a = tiny.attentions(plain, input_ids=IDS)[0][layer][0, head].double()
    values = {}

    def note(place: str, at: int, x: torch.Tensor) -> None:
        if (place, at) == ("v", layer):
            values["v"] = x[0, :, head * x.shape[2] // 4].double()

    with model.projections(note), torch.no_grad():
        model.logits(IDS)
    norm = (values["v"] @ model.head_weights(layer).W_O[head].double()).norm(dim=1)
    view = model.look(IDS, (layer, head)).views["own"]
    n = IDS.shape[1]
    moves = a * norm
    for weights, keys, dense in (
        (view.weights, view.keys, a),
        (view.values, view.value_keys, moves / moves.sum(1, keepdim=True)),
    ):
        k = weights.shape[1]
        np.testing.assert_allclose(weights, dense.topk(k, 1).values.detach(), atol=1e-5)
        there = keys >= 0
        at = np.take_along_axis(dense.detach().numpy(), np.where(there, keys, 0), 1)
        np.testing.assert_allclose(np.where(there, at, 0), weights, atol=1e-5)
        assert (keys[0, 1:] == -1).all()  # the first query sees one key
    np.testing.assert_allclose(view.key_norm, norm.detach(), rtol=1e-4)
    np.testing.assert_allclose(view.moved, moves.sum(1).detach(), rtol=1e-4)
    np.testing.assert_allclose(view.first, a[:, 0].detach(), atol=1e-6)
    entropy = -(a * a.clamp_min(1e-300).log()).sum(1)
    np.testing.assert_allclose(view.entropy, entropy.detach(), atol=1e-5)
    window = tiny.window_of(model.config, layer) or n
    seen = torch.tensor([min(n - k, window) for k in range(n)])
    np.testing.assert_allclose(view.received, (a.sum(0) / seen).detach(), atol=1e-6)
    np.testing.assert_allclose(view.total, a.sum(0).detach(), atol=1e-5)
    r = view.from_weights.shape[1]
    np.testing.assert_allclose(view.from_weights, a.T.topk(r, 1).values.detach(), atol=1e-6)
    back = np.take_along_axis(a.T.detach().numpy(), np.where(view.queries < 0, 0, view.queries), 1)
    np.testing.assert_allclose(np.where(view.queries < 0, 0, back), view.from_weights, atol=1e-6)


def test_edits_stand_beside_the_untouched_run() -> None:
    model, _ = loaded("llama")
    edits = [Ablate(["L0H1"]), ScaleTokens([4, 5], 3.0)]
    with model.edit(*edits):
        wanted = model(input_ids=IDS, output_attentions=True).attentions[1][0, 2]
    look = model.look(IDS, "L1H2", edits=edits)
    assert list(look.views) == ["own", "edited"]
    k = look.views["edited"].weights.shape[1]
    top = wanted.topk(k, 1).values
    np.testing.assert_allclose(look.views["edited"].weights, top.detach(), atol=1e-5)
    own = model.look(IDS, "L1H2").views["own"]
    np.testing.assert_array_equal(look.views["own"].weights, own.weights)
    assert not np.allclose(look.views["edited"].weights, own.weights, atol=1e-3)
    torch.testing.assert_close(
        model.attention(IDS, "L1H2", edits=edits), wanted.detach(), atol=1e-5, rtol=1e-4
    )


def test_weights_that_an_edit_leaves_none_of_are_refused() -> None:
    model, _ = loaded("llama")
    with pytest.raises(TapError, match=r"model\.look"):
        model.look(IDS, "L1H2", edits=[SoftplusReweight()])
    assert not model.observers_and_edits()[1]


def test_the_text_tower_of_a_vision_language_model() -> None:
    model, plain = interp.load(seeing.llava()[0]), seeing.llava()[1]
    ids = model.tokens("is there a table ?")["input_ids"]
    wanted = plain(input_ids=ids, output_attentions=True).attentions[1][0, 2]
    torch.testing.assert_close(model.attention(ids, "L1H2"), wanted.detach(), atol=1e-5, rtol=1e-4)
    assert "table" in "".join(model.look("is there a table ?", "text.L1H2").tokens)
    with pytest.raises(InputError, match=r"interp\.overlay"):
        model.look("is there a table ?", "vision.L0H0")


def test_saved_and_read_again(tmp_path: Path) -> None:
    model, _ = loaded("llama")
    look = model.look(IDS, "L1H2", edits=[Ablate(["L0H1"])])
    back = Look.load(look.save(tmp_path / "look.safetensors"))
    assert repr(back) == repr(look) and back.frame.equals(look.frame)
    assert list(back.views) == ["own", "edited"]
    (tmp_path / "bad").write_bytes(b"x" * 40)
    for path in (tmp_path / "bad", tmp_path / "none"):
        with pytest.raises(OutputError):
            Look.load(path)


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    model = interp.load("llama")
    with pytest.raises(HeadError):
        model.look("the cat", "L9H0")
    for text in ("", "   ", 7):
        with pytest.raises(InputError):
            model.look(text, "L0H0")
    with pytest.raises(InputError, match="There is no text file"):
        model.look("none.txt", "L0H0")
    with pytest.raises(ContextError):
        model.look(torch.ones(1, 10**6, dtype=torch.long), "L0H0")
    with pytest.raises(InputError, match=r"GiB; ask for fewer heads.*model\.look"):
        interp.load(tiny.build("llama", max_position_embeddings=10**6)).attention(
            torch.ones(1, 20_000, dtype=torch.long)
        )
    with pytest.raises(InputError, match="no token 99"):
        model.look("the cat", "L0H0").at(99)
    with pytest.raises(InputError, match="no tokenizer"):
        interp.load(tiny.build("llama")).look("the cat", "L0H0")


def test_a_text_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("the cat saw the dog")
    assert content(path) == content(str(path)) == content("the cat saw the dog")
    model = interp.load("llama")
    assert model.look(path, "L0H2").tokens == model.look(path.read_text(), "L0H2").tokens


def test_texts_in_place_of_ids() -> None:
    model = interp.load("llama")
    one, other = "the cat saw the dog .", "the king"
    both = model([one, other]).logits
    torch.testing.assert_close(both[0, -1], model(one).logits[0, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[1, -1], model(other).logits[0, -1], atol=1e-4, rtol=1e-4)
    said = model.generate([one, other], max_new_tokens=4)
    assert said == [model.generate(t, max_new_tokens=4) for t in (one, other)]
    ids = model.tokenizer(one, return_tensors="pt")["input_ids"]
    new = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert said[0] == model.tokenizer.decode(new, skip_special_tokens=True)
    with pytest.raises(InputError):
        model.generate(["", "the cat"])


TEXTS = ["the cat saw the dog .", "naïve 🙂 日本 text\n\nwith  blanks"]


def byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["the cat"], trainers.BpeTrainer(initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text(text: str) -> None:
    tokenizer = byte_level()
    found = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(found) == text
    assert "🙂" not in text or "🙂" in found  # a character of four tokens stands in the first


def test_pieces_of_a_word_level_vocabulary(tokenizer: Any) -> None:
    ids = tokenizer.encode("the cat saw the dog .")
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_the_frame_says_where_a_token_looks_the_first_included() -> None:
    model, _ = loaded("llama")
    frame, a = model.look(IDS, "L1H2").frame, model.attention(IDS, "L1H2").numpy()
    np.testing.assert_array_equal(frame["at"], a.argmax(1))
    np.testing.assert_allclose(frame.weight, a.max(1), atol=1e-6)
    np.testing.assert_allclose(frame["first"], a[:, 0], atol=1e-6)
    assert frame.past_first_at[0] == -1 and np.isnan(frame.past_first_weight[0])
    np.testing.assert_array_equal(frame.past_first_at[1:], 1 + a[1:, 1:].argmax(1))
    np.testing.assert_allclose(frame.past_first_weight[1:], a[1:, 1:].max(1), atol=1e-6)
    seen = np.arange(len(a), 0, -1)  # how many tokens see each
    np.testing.assert_allclose(frame.received, a.sum(0) / seen, atol=1e-6)


def test_edits_are_said_in_a_phrase() -> None:
    model, _ = loaded("llama")
    edits = [interp.edits.Ablate(["L1H2"]), interp.edits.ScaleHeads({"L0H1": 0.5})]
    look = model.look(IDS, "L1H2", edits=edits)
    page = look.page()
    assert "Ablate L1H2; mode zero" in page and "ScaleHeads L0H1" in page
    assert "reference=None" not in page


def numbers(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_the_page_holds_the_numbers() -> None:
    model, _ = loaded("llama")
    view = model.look(IDS, "L1H2").views["own"]
    said = packed(view, wide=False)
    np.testing.assert_array_equal(
        numbers(said["keys"], "<u2"), np.where(view.keys < 0, 0xFFFF, view.keys).ravel()
    )
    np.testing.assert_allclose(
        numbers(said["weights"], "<u2") / 0xFFFF, view.weights.ravel(), atol=1e-5
    )
    top = said["scales"]["entropy"]
    np.testing.assert_allclose(
        numbers(said["entropy"], "<u2") / 0xFFFF * top, view.entropy, atol=top * 1e-4
    )


def test_a_page_of_32k_tokens_is_small() -> None:
    n, rng = 32_768, np.random.default_rng(0)
    k, r = kept(n)
    from interp.look import View

    def rows(width: int) -> Any:
        return rng.random((n, width), dtype=np.float32)

    view = View(
        rng.integers(0, n, (n, k)), rows(k), rng.integers(0, n, (n, k)), rows(k),
        *(rows(1)[:, 0] for _ in range(7)), rng.integers(0, n, (n, r)), rows(r),
    )  # fmt: skip
    words = [f" word{i % 1000}" for i in range(n)]
    page = render(Look("model", "L0H0", words, {"own": view}, {}))
    assert len(page) < 3_000_000
    assert not re.search(r"https?://", page)


WALK = """
const at = (t) => document.querySelector(`#text span[data-t="${t}"]`);
const side = () => document.getElementById("side").textContent.replace(/\\s+/g, " ");
say(side());
at(8).dispatchEvent(new PointerEvent("pointerover", {bubbles: true, pointerType: "mouse"}));
say(side());
at(8).dispatchEvent(new MouseEvent("click", {bubbles: true}));
document.getElementById("text").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
say(side());
document.querySelector("input[value=value]").click();
say(side());
document.querySelector("input[value=to]").click();
document.getElementById("text").dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
say(side());
say(document.documentElement.scrollWidth <= window.innerWidth);
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 800, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_walking_through_the_page(tmp_path: Path, width: int, dark: bool) -> None:
    model = interp.load("llama")
    look = model.look("the cat saw the dog . the cat saw the dog .", "L2H4")
    page = look.report(tmp_path / "look.html")
    rest, hovered, walked, by_value, free, fits = browser.run(
        page, WALK, tmp_path, width, dark=dark
    ).splitlines()
    assert "token 14)" in rest and "Most looked at" in free  # at rest the last token
    received = look.frame.received[1:].max()
    assert f"{received:.2f}"[1:] in free
    top = look.at(8, 1)
    assert "token 8)" in hovered and f"{top.weight.item():.2f}"[1:] in hovered
    assert "token 9)" in walked and "weight" in walked
    share = look.at(9, 1, by_value=True).share.item()
    assert f"{share:.2f}"[1:] in by_value
    assert fits == "true"
