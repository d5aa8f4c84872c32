"""Scores that put one head's output back: against whole forwards of an eager model with hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import interp
from interp.inputs import lexicon
from interp.inputs.endings import Ending, PutHeads, last_outputs
from interp.inputs.shown import shown_pairs
from interp.inputs.tokenizer import Text
from interp.probes.answer import AnswerProbe
from interp.probes.settings import Settings
from interp.scores.function_vector import SHOTS, FunctionVector
from interp_hooks import Head, HookedModel

Worded = Callable[[str], tuple[HookedModel, Any]]
MODELS = ["llama", "gpt2"]


def put(plain: Any, layer: int, head: int, value: torch.Tensor) -> Any:
    """The output of a head at the last tokens replaced, by a hook of the output projection."""

    def change(z: torch.Tensor) -> torch.Tensor:
        new = z.clone()
        new[:, -len(value) :, head] = value
        return new

    return tiny.rewriting_z(plain, layer, change)


def outputs(plain: Any, ids: list[int], last: int) -> dict[int, torch.Tensor]:
    """layer → (last, heads, d_head) of a whole forward."""
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def change(z: torch.Tensor) -> torch.Tensor:
            kept[layer] = z[0, -last:].clone()
            return z

        return tiny.rewriting_z(plain, layer, change)

    with torch.no_grad(), keep(0), keep(1):
        plain(input_ids=torch.tensor([ids]))
    return kept


@torch.no_grad()
def log_probs(plain: Any, ids: list[int], under: Any = None) -> torch.Tensor:
    """(tokens, vocabulary) float64."""
    with under or nullcontext():
        return plain(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_an_ending_is_the_whole_prompt(worded: Worded, name: str) -> None:
    model, plain = worded(name)
    ids, last = list(range(20, 45)), 3
    ending = Ending(model, ids, last)
    wanted = log_probs(plain, ids)[-last:]
    for _ in range(2):  # a run leaves the kept cache as it was
        found = ending.logits(2).double().log_softmax(-1)
        torch.testing.assert_close(found, wanted.expand(2, -1, -1), atol=1e-4, rtol=1e-4)
    other = last_outputs(model, [*range(60, 85)], last)
    for layer, z in outputs(plain, [*range(60, 85)], last).items():
        torch.testing.assert_close(other[layer], z, atol=1e-4, rtol=1e-4)
    heads = [Head(1, 2), Head(0, 3)]
    found = ending.logits(2, PutHeads(heads, other)).double().log_softmax(-1)
    for row, head in enumerate(heads):
        under = put(plain, head.layer, head.head, other[head.layer][:, head.head])
        torch.testing.assert_close(found[row], log_probs(plain, ids, under)[-last:],
                                   atol=1e-4, rtol=1e-4)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_cri_is_its_definition(worded: Worded, name: str) -> None:
    model, plain = worded(name)
    settings = Settings(96, 2, 3, force=True)
    atlas = interp.scan_heads(model, "cri", 96, 2, 3, progress=False, force=True)
    wanted = np.zeros((2, 2, 4))
    for sample, batch in enumerate(AnswerProbe().make(model, settings)):
        problem = batch.info["instance"]
        first, (*_, end) = problem.positions[0], problem.positions
        answer = [accepted[0] for accepted in problem.accept]
        right, wrong = [*problem.ids], [*problem.corrupted]
        wrong[first + 1 :] = right[first + 1 :]
        assert len(right) == len(wrong) == end + 1 and right != wrong and len(answer) > 1
        assert right[first + 1 :] == answer[:-1]
        kept = outputs(plain, right, len(answer))

        def said(under: Any = None, ids: Any = wrong, y: Any = answer) -> float:
            logp = log_probs(plain, ids, under)[-len(y) :]
            return sum(float(logp[i, token]) for i, token in enumerate(y))

        base = said()
        for layer in range(2):
            for head in range(4):
                moved = said(put(plain, layer, head, kept[layer][:, head]))
                wanted[sample, layer, head] = moved - base
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(np.asarray(atlas["cri"], float), wanted.mean(0), atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_function_vector_is_its_definition(
    worded: Worded, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = worded(name)
    text = Text(model.tokenizer)
    nouns = [w for w in lexicon.NOUNS if len(text.encode(f" {w}")) == 1][:30]
    relations = {"one": list(zip(nouns[:15], nouns[15:], strict=True)),
                 "other": list(zip(nouns[15:], nouns[:15], strict=True))}  # fmt: skip
    words = {k: [w for pair in pairs for w in pair] for k, pairs in relations.items()}
    monkeypatch.setattr(lexicon, "RELATIONS", {**words, "none": ["zqx wv", "qqq zz"] * 20})
    atlas = interp.scan_heads(model, "function_vector", 96, 2, 3, progress=False)
    wanted = []
    for number, pairs in enumerate(relations.values()):
        rng = np.random.default_rng([3, number])
        asked = rng.permutation(15)[:2]
        prompts = [shown_pairs(text, pairs, int(i), SHOTS, rng) for i in asked]
        kept = [outputs(plain, p.ids, 1) for p in prompts]
        for prompt in prompts:
            y = text.encode(f" {pairs[int(asked[prompts.index(prompt)])][1]}")[0]

            def p(under: Any = None, ids: Any = prompt.shuffled, y: int = y) -> float:
                return float(log_probs(plain, ids, under)[-1, y].exp())

            base = p()
            wanted.append(
                [
                    [p(put(plain, la, h, (kept[0][la] + kept[1][la])[:, h] / 2)) - base
                     for h in range(4)] for la in range(2)
                ]
            )  # fmt: skip
    found = np.asarray(atlas["function_vector"], float)
    assert np.abs(np.mean(wanted, 0)).max() > 1e-6
    np.testing.assert_allclose(found, np.mean(wanted, 0), atol=1e-8, rtol=1e-3)


def test_a_tokenizer_without_the_words_is_noted(worded: Worded) -> None:
    model = worded("llama")[0]
    atlas = interp.scan_heads(model, ["sink", "function_vector"], 64, 1, progress=False)
    assert any(note.startswith("function_vector: not measured. Of no relation")
               for note in atlas.notes)  # fmt: skip


def test_relations_are_pairs_and_no_input_has_two_outputs() -> None:
    for name, words in lexicon.RELATIONS.items():
        inputs = words[::2]
        assert len(words) % 2 == 0 and len(set(inputs)) == len(inputs), name
        assert len(inputs) >= SHOTS + 10 and FunctionVector.optional


def test_a_shuffled_prompt_shows_no_pair_of_the_relation(worded: Worded) -> None:
    text = Text(worded("llama")[0].tokenizer)
    pairs = [("cat", "dog"), ("store", "garden"), ("Mary", "John"), ("ball", "book")]
    shown = shown_pairs(text, pairs, 0, 3, np.random.default_rng(0))
    right, dealt = (worded("llama")[0].tokenizer.decode(i) for i in (shown.ids, shown.shuffled))
    for one, other in pairs[1:]:
        assert f"{one} A: {other}" in " ".join(right.split())
        assert f"{one} A: {other}" not in " ".join(dealt.split())
