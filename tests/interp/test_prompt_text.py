"""Edits that name keys by a text of the prompt: the same tokens as positions given by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import edits as E
from interp.edits.prompt_text import locate
from interp_hooks import HookedModel, hook
from interp_hooks.errors import EditError

Span = E.Span
#: two prompts of unequal length that hold the same words, one of them twice
PROMPTS = ["the cat saw the dog .", "the dog went to the river . the cat saw the child"]
WORDS = "cat saw the"


@pytest.fixture(scope="module")
def byte_pairs() -> Any:
    """A byte-level tokenizer whose tokens join words, and whose other characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eot>"],
        show_progress=False,
    )
    core.train_from_iterator(["ab ab ba abb a b aab é é"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eot>", pad_token="<eot>")


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="ab é字🙂\n", min_size=1, max_size=24),
    start=st.integers(0, 23),
    length=st.integers(1, 6),
)
def test_every_token_that_overlaps_the_last_place(
    byte_pairs: Any, text: str, start: int, length: int
) -> None:
    """Against the character offsets that the tokenizer gives when it encodes."""
    start %= len(text)
    part = text[start : start + length]
    encoded = byte_pairs(text, return_offsets_mapping=True)
    first = text.rfind(part)
    overlap = [
        i
        for i, (a, b) in enumerate(encoded["offset_mapping"])
        if a < first + len(part) and first < b
    ]
    assert locate(byte_pairs, encoded["input_ids"], part) == (overlap[0], overlap[-1] + 1)
    assert locate(byte_pairs, encoded["input_ids"], "c") is None


def test_special_tokens_are_text_too(byte_pairs: Any) -> None:
    ids = [*byte_pairs.encode("ab "), byte_pairs.eos_token_id, *byte_pairs.encode("é")]
    n = len(ids)
    assert locate(byte_pairs, ids, "<eot>") == locate(byte_pairs, ids, "eo")
    place = locate(byte_pairs, ids, "<eot>")
    assert place is not None and ids[slice(*place)] == [byte_pairs.eos_token_id]
    assert locate(byte_pairs, ids, "é") == (place[1], n)


def batch(tokenizer: Any, side: str) -> tuple[Any, torch.Tensor]:
    """(inputs, bool marks of the words by their offsets) of both prompts, padded."""
    before = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side, tokenizer.pad_token = side, tokenizer.pad_token or tokenizer.eos_token
    try:
        inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side, tokenizer.pad_token = before
    inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    marks = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, text in enumerate(PROMPTS):
        ids = tokenizer(text)["input_ids"]
        pieces = [p.strip("▁") for p in tokenizer.convert_ids_to_tokens(ids)]
        words = WORDS.split()
        (at,) = (i for i in range(len(ids)) if pieces[i : i + 3] == words)
        pad = int((1 - inputs["attention_mask"][row]).sum()) if side == "left" else 0
        marks[row, pad + at : pad + at + 3] = True
    return inputs, marks


def logits(model: HookedModel, inputs: Any, *edits: Any) -> torch.Tensor:
    with torch.no_grad(), model.edit(*edits):
        return model.logits(**inputs, position_ids=tiny.positions(inputs["attention_mask"]))


KINDS: dict[str, Callable[[Any], Any]] = {
    "scale_tokens": lambda keys: E.ScaleTokens(keys, gain=3.0, heads="0.1, 1.2"),
    "seka": lambda keys: E.SEKA(keys, ["0.1", "1.0"], torch.eye(8).repeat(2, 1, 1), 2.0),
    "spotlight": lambda keys: E.SpotLight(keys, target=0.6, heads="0.1, 1.2"),
    "donors": lambda keys: E.MoveMass(keys, "initial", share=0.7),
    "receivers": lambda keys: E.MoveMass("initial", keys, share=0.7),
    "paint": lambda keys: E.PAINT(keys, 0.6),
    "var": lambda keys: E.VAR(
        keys, text_sinks="initial", p=0.8, rho=0.0, image_mass=0.0, dims=None, last_layer=True
    ),
    "var sinks": lambda keys: E.VAR(
        (1, 4), text_sinks={0: keys}, p=0.8, rho=0.0, image_mass=0.0, dims=None, last_layer=True
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_with_padding(worded: Any, tokenizer: Any, side: str, kind: str) -> None:
    """The words stand elsewhere in each sample."""
    if kind == "paint" and side == "right":
        return  # refused
    model, _ = worded("llama")
    inputs, marks = batch(tokenizer, side)
    by_text = logits(model, inputs, KINDS[kind](Span(WORDS)))
    assert torch.equal(by_text, logits(model, inputs, KINDS[kind](marks)))
    assert not torch.equal(by_text, logits(model, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["", "left"])
def test_the_same_positions_in_all_samples(
    worded: Any, tokenizer: Any, side: str, kind: str
) -> None:
    model, _ = worded("llama")
    inputs, marks = batch(tokenizer, "left")
    row = 1 if not side else 0
    pad = int((1 - inputs["attention_mask"][row]).sum())
    inputs = {k: v[row : row + 1].repeat(2, 1) for k, v in inputs.items()}
    at = int(marks[row].int().argmax()) - pad
    by_text = logits(model, inputs, KINDS[kind](Span(WORDS)))
    assert torch.equal(by_text, logits(model, inputs, KINDS[kind](Span(at, at + 3))))
    assert torch.equal(by_text, logits(model, inputs, KINDS[kind]((at, at + 3))))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache(worded: Any, tokenizer: Any, name: str, beams: int) -> None:
    """Decode steps, past the sliding window too; beams are reordered, each sample keeps its own."""
    model, _ = worded(name)
    inputs, marks = batch(tokenizer, "left")
    more = dict(
        max_new_tokens=8,
        do_sample=False,
        num_beams=beams,
        pad_token_id=2,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )

    def run(*edits: Any) -> Any:
        with model.edit(*edits):
            return model.generate(**inputs, **more)

    def edit(keys: Any) -> E.ScaleTokens:
        return E.ScaleTokens(keys, gain=5.0)

    by_text, by_hand, own = run(edit(Span(WORDS))), run(edit(marks)), run()
    assert torch.equal(by_text.sequences, by_hand.sequences)
    assert torch.equal(torch.stack(by_text.logits), torch.stack(by_hand.logits))
    assert not torch.equal(torch.stack(by_text.logits), torch.stack(own.logits))


def test_what_is_generated_is_not_searched(worded: Any, tokenizer: Any) -> None:
    """The words said again are no key of the edit; a second turn's prompt is."""
    model, _ = worded("llama")
    ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    words = tokenizer(WORDS, add_special_tokens=False, return_tensors="pt")["input_ids"]
    at = ids.shape[1] - 4

    def steps(chunks: list[torch.Tensor], by_hand: list[Any]) -> torch.Tensor:
        """Logits after each chunk, under the edit by text, or by hand in each chunk's own block."""
        rows, cache = [], None
        text = [] if by_hand else [E.ScaleTokens(Span(WORDS), gain=4.0)]
        with torch.no_grad(), model.edit(*text):
            for i, chunk in enumerate(chunks):
                with model.clean():  # another text in between leaves no trace
                    model.logits(ids[:, :4])
                here = [E.ScaleTokens(by_hand[i], gain=4.0)] if by_hand else []
                with model.edit(*here):
                    out = model(input_ids=chunk, past_key_values=cache, use_cache=True)
                rows.append(out.logits[:, -1])
                cache = out.past_key_values
        return torch.cat(rows)

    first, again = (at, at + 3), (ids.shape[1], ids.shape[1] + 3)
    said = [ids, *words.split(1, 1)]
    assert torch.equal(steps(said, []), steps(said, [first] * 4))
    turns = [ids, words]
    assert torch.equal(steps(turns, []), steps(turns, [first, again]))
    assert not torch.equal(steps(turns, []), steps(turns, [first, first]))


def test_in_json_and_as_a_value() -> None:
    edit = E.ScaleTokens(Span("text: 2:5"), gain=2.0)
    data = edit.to_json()
    assert data["keys"] == "text:text: 2:5"
    assert E.from_json(data) == [edit]
    assert E.from_json({**data, "keys": "2:5"}) == [E.ScaleTokens((2, 5), gain=2.0)]
    assert repr(Span("a")) == "Span('a')" and repr(Span(2, 5)) == "Span(2, 5)"
    assert Span("a").text == "a" and Span(2, 5).text is None
    assert "span" not in E.names() and "keys" not in E.names()


@pytest.mark.parametrize("wrong", [("",), ("a", 3), (5, 2), (-1, 2), (3,)])
def test_spans_that_are_none(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(EditError):
        Span(*wrong)


def test_where_the_text_does_not_occur(worded: Any, tokenizer: Any) -> None:
    model, _ = worded("llama")
    inputs, _ = batch(tokenizer, "left")
    edit = E.ScaleTokens(Span("river"), gain=2.0)
    with pytest.raises(EditError, match=r"'river' does not occur.*sample 0 \(of 2\).*saw the dog"):
        logits(model, inputs, edit)
    assert "does not occur" in model.explain(edit)
    with pytest.raises(EditError, match="tokens in common"):
        E.MoveMass(Span("a"), Span("a"))


def test_where_tokens_are_not_known(worded: Any, tapped: Any, tokenizer: Any) -> None:
    edit = E.ScaleTokens(Span(WORDS), gain=2.0)
    bare, _ = tapped("llama")
    with pytest.raises(EditError, match="no tokenizer"), bare.edit(edit):
        pass
    model, _ = worded("llama")
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        embedded = model.module.get_input_embeddings()(ids)
        with pytest.raises(EditError, match="embeddings"), model.edit(edit):
            model(inputs_embeds=embedded)
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(EditError, match="before the edit's block"), model.edit(edit):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def test_transformer_lens_finds_the_same(tokenizer: Any) -> None:
    pytest.importorskip("transformer_lens")
    from prompts import hooked_transformer

    module: Any = tiny.build("llama", len(tokenizer), seed=1)
    model = hook(hooked_transformer(module), tokenizer=tokenizer)
    inputs, marks = batch(tokenizer, "left")
    edits = [E.ScaleTokens(keys, gain=4.0) for keys in (Span(WORDS), marks)]
    found = []
    for edit in edits:
        with torch.no_grad(), model.edit(edit):
            found.append(model.logits(**inputs))
    assert torch.equal(*found)
