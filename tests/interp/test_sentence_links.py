"""Attention between sentences and what hiding one does, against eager attention matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis

import interp
from interp.errors import InputError
from interp.inputs.sentences import sentences
from interp.inputs.tokenizer import Text
from interp.mechanics import sentence_effects, sentence_links
from interp.mechanics.sentence_links import SentenceLinks
from interp_hooks import Head, HookedModel

Worded = Callable[[str], tuple[HookedModel, Any]]
MODELS = ["llama", "gpt2"]
TEXT = " ".join(
    f"{a} {verb} {b} ."
    for a, verb, b in zip(
        [
            "the cat",
            "the dog",
            "the old man",
            "the cat",
            "the girl",
            "the dog",
            "the boy",
            "the man",
        ],
        ["saw", "took", "saw", "found", "saw", "took", "liked", "saw"],
        ["the dog", "a book", "the girl", "the boy", "the cat", "the man", "a book", "the boy"],
        strict=True,
    )
)


def tokens(model: HookedModel) -> list[int]:
    reader = Text(model.tokenizer)
    return [*reader.bos, *reader.plain(TEXT)]


@torch.no_grad()
def eager(plain: Any, ids: list[int], mask: Any = None) -> Any:
    return plain(input_ids=torch.tensor([ids]), attention_mask=mask, output_attentions=True)


@pytest.mark.parametrize("name", MODELS)
def test_links_are_means_of_the_matrix(worded: Worded, name: str) -> None:
    model, plain = worded(name)
    ids = tokens(model)
    links = sentence_links(model, TEXT)
    assert len(links.spans) == 8 and links.spans == sentences(model.tokenizer, ids)
    assert links.sentences[1].split() == "the dog took a book .".split()
    a = [one[0].double() for one in eager(plain, ids).attentions]
    for head, got in zip(links.heads, links.attention, strict=True):
        own = a[head.layer][head.head]
        for i, (i0, i1) in enumerate(links.spans):
            for j, (j0, j1) in enumerate(links.spans):
                keys = own[max(i0, 1) : i1, max(j0, 1) : j1]
                assert got[i, j] == pytest.approx(float(keys.mean()), abs=1e-6)
    v = links.received(3)
    assert v[2, 1] == pytest.approx(links.attention[2, 4:, 1].mean())
    np.testing.assert_allclose(links.kurtosis(3), kurtosis(v, axis=1, fisher=True), rtol=1e-6)


def test_a_head_that_looks_at_one_sentence_is_first() -> None:
    """Planted: head 1 gives sentence 2 most, head 0 gives all the same, and chance nearly so."""
    n, rng = 20, np.random.default_rng(0)
    even = np.tril(np.full((n, n), 0.01))
    one = even.copy()
    one[:, 2] += 0.05
    some = even + rng.normal(0, 1e-3, (n, n))
    links = SentenceLinks([], [], [Head(0, h) for h in range(3)], np.stack([even, one, some]))
    found = links.kurtosis()
    assert np.isnan(found[0]) and found[1] > 8 and abs(found[2]) < 2


@pytest.mark.parametrize("name", MODELS)
def test_hiding_a_sentence(worded: Worded, name: str) -> None:
    """Against eager forwards with a 4-D mask that hides it from what comes after."""
    model, plain = worded(name)
    ids = tokens(model)
    found = sentence_effects(model, ids)
    spans = sentence_links(model, ids).spans
    assert np.isnan(found[np.triu_indices(8)]).all()
    before = eager(plain, ids).logits[0].double().log_softmax(-1)
    for j in (0, 3):
        start, stop = max(spans[j][0], 1), spans[j][1]
        sees = torch.ones(len(ids), len(ids)).tril().bool()
        sees[stop:, start:stop] = False
        bias = torch.zeros(len(ids), len(ids)).masked_fill(~sees, torch.finfo(torch.float32).min)
        after = eager(plain, ids, bias[None, None]).logits[0].double().log_softmax(-1)
        kl = (before.exp() * (before - after)).sum(-1)
        for i in range(j + 1, 8):
            want = float(kl[slice(*spans[i])].log().mean())
            assert found[i, j] == pytest.approx(want, abs=0.02)


def test_receiver_is_their_kurtosis(worded: Worded) -> None:
    model, _ = worded("llama")
    text = " ".join([TEXT] * 3)
    atlas = interp.scan_heads(model, "receiver", context=120, samples=2, text=text, progress=False)
    rows = interp.probes.Settings(120, 2, 0, text=text).rows(model.tokenizer)
    want = np.mean([sentence_links(model, row).kurtosis() for row in rows], 0)
    np.testing.assert_allclose(np.asarray(atlas["receiver"]).ravel(), want, rtol=1e-5)


def test_too_few_sentences_are_said(worded: Worded) -> None:
    model, _ = worded("llama")
    for run in (sentence_links, sentence_effects):
        with pytest.raises(InputError, match="has 1 sentences of 3 tokens"):
            run(model, "the cat saw the dog")
    with pytest.raises(InputError, match="give a longer one"):
        interp.scan_heads(model, "receiver", context=32, samples=1, progress=False)
    atlas = interp.scan_heads(model, "sink,receiver", context=32, samples=1, progress=False)
    assert any(note.startswith("receiver: not measured. A text of 32") for note in atlas.notes)
