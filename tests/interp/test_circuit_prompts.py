"""Prompts for circuits: what is refused and how, padding, what a model must be able to do; circuits
as tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from interp import circuits
from interp.atlas import Atlas
from interp.circuits.circuit import Circuit
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, from_file, from_task, from_texts
from interp.errors import InputError, OutputError, UnknownNameError
from interp.results.head_table import KEYS
from interp_hooks import HookedModel, hook

ROW = {
    "clean": "When Mary and John went to the",
    "corrupted": "When Anna and John went to the",
    "answer": " shop",
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def words(pocket: HookedModel) -> list[str]:
    """Words that are one token after a space."""
    names = (
        "Mary",
        "John",
        "Anna",
        "Tom",
        "the",
        "and",
        "to",
        "went",
        "gave",
        "a",
        "in",
        "book",
        "ring",
    )
    found = [
        w for w in names if len(pocket.tokenizer.encode(" " + w, add_special_tokens=False)) == 1
    ]
    assert len(found) >= 6
    return found


def pair(words: list[str], length: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A row of so many words, whose twin has another first word."""
    rng = np.random.default_rng([seed, length])
    chosen = [str(w) for w in rng.permutation(words * 3)[:length]]
    other = next(w for w in words if w != chosen[0])
    clean, corrupted = (
        "".join(f" {w}" for w in chosen),
        "".join(f" {w}" for w in [other, *chosen[1:]]),
    )
    row = {
        "clean": clean,
        "corrupted": corrupted,
        "answer": " " + words[0],
        "wrong": [" " + words[1]],
    }
    return {**row, **more}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clean": None}, "Prompt 2 is not an object with texts"),
        ({"answer": 7}, "Prompt 2 is not an object with texts"),
        ({"corrupted": None}, "Prompt 2 has no negative example"),
        ({"wrong": 7}, "Prompt 2 has 7 for"),
        ({"wrong": [7]}, "for \"wrong\", which is a text or a list"),
        ({"wrong": {"a": "b"}}, "for \"wrong\", which is a text or a list"),
    ],
)  # fmt: skip
def test_rows_that_are_not_prompts(
    pocket: HookedModel, words: list[str], change: dict[str, Any], said: str
) -> None:
    rows = [
        pair(words, 5),
        {k: v for k, v in {**pair(words, 5, 1), **change}.items() if v is not None},
    ]
    with pytest.raises(InputError, match=said):
        from_texts(pocket, rows)


def test_pairs_of_two_lengths_are_refused(pocket: HookedModel, words: list[str]) -> None:
    row = pair(words, 5)
    n = len(pocket.tokenizer.encode(row["clean"]))
    with pytest.raises(InputError, match=f"Prompt 1 has {n} tokens and its corrupted twin {n + 1}"):
        from_texts(pocket, [{**row, "corrupted": row["corrupted"] + " " + words[2]}])


def test_answers_are_one_token(pocket: HookedModel, words: list[str]) -> None:
    two = f" {words[0]} {words[1]}"
    with pytest.raises(
        InputError, match=f"The answer '{two}' of prompt 1 is 2 tokens and must be one"
    ):
        from_texts(pocket, [pair(words, 5, answer=two, wrong=[])])
    with pytest.raises(InputError, match=f"The answer '{two}' of prompt 1 is 2 tokens"):
        from_texts(pocket, [pair(words, 5, wrong=[f" {words[1]}", two])])
    with pytest.raises(InputError, match="'' of prompt 1 is 0 tokens"):
        from_texts(pocket, [pair(words, 5, answer="")])
    with pytest.raises(InputError, match="among the wrong ones"):
        from_texts(pocket, [pair(words, 5, wrong=[f" {words[0]}"])])


def test_there_must_be_prompts_and_a_difference(pocket: HookedModel, words: list[str]) -> None:
    with pytest.raises(InputError, match="no prompts"):
        from_texts(pocket, [])
    same = pair(words, 5)
    with pytest.raises(InputError, match="no negative examples"):
        from_texts(pocket, [{**same, "corrupted": same["clean"]}])
    # one pair that differs is enough
    assert len(from_texts(pocket, [{**same, "corrupted": same["clean"]}, pair(words, 5, 1)])) == 2


def test_wrong_answers_are_optional_and_may_be_one_text(
    pocket: HookedModel, words: list[str]
) -> None:
    for given, n in (
        (None, 0),
        ([], 0),
        (" " + words[1], 1),
        ([" " + words[1], " " + words[2]], 2),
    ):
        (found,) = from_texts(pocket, [pair(words, 5, wrong=given)]).instances
        assert len(found.wrong[0]) == n
        assert found.positions == (len(found.ids) - 1,)


def test_tasks_of_pictures_and_unknown_tasks(pocket: HookedModel) -> None:
    with pytest.raises(InputError, match="is about pictures"):
        from_task(pocket, "pope", 2)
    with pytest.raises(UnknownNameError, match="did you mean ioi"):
        from_task(pocket, "ioii", 2)


def test_files_with_a_list_or_an_object_a_line(
    pocket: HookedModel, words: list[str], tmp_path: Path
) -> None:
    rows = [pair(words, 5, seed) for seed in range(3)]
    a, b = tmp_path / "a.json", tmp_path / "b.jsonl"
    a.write_text(json.dumps(rows, indent=2), encoding="utf-8-sig")
    b.write_text("\n" + "\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    wanted = from_texts(pocket, rows).instances
    assert from_file(pocket, a).instances == wanted
    assert from_file(pocket, str(b)).instances == wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[{", "is not JSON"),
        (b'{"clean": "a"}\nnot json', "is not JSON"),
        (b"\xff\xfe\xfa", "is not UTF-8"),
        (b"", "There are no prompts"),
        (b"[]", "There are no prompts"),
        (b'["a"]', "Prompt 1 is not an object"),
        (b"7", "Prompt 1 is not an object"),
    ],
)
def test_files_that_are_no_prompts(
    pocket: HookedModel, tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "prompts.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        from_file(pocket, path)


def test_files_that_are_not_there(pocket: HookedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.json can't be read \(no such file"):
        from_file(pocket, tmp_path / "gone.json")
    with pytest.raises(InputError, match="can't be read"):
        from_file(pocket, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # rotary and learned positions
def test_margins_do_not_depend_on_padding(family: str, words: list[str], tokenizer: Any) -> None:
    model = hook(tiny.build(family, len(tokenizer)).double(), name=family, tokenizer=tokenizer)
    rows = [
        pair(words, n, n, wrong=[" " + w for w in words[1 : 1 + n % 3]]) for n in (3, 9, 4, 6, 9)
    ]
    prompts = from_texts(model, rows)
    assert len({len(i.ids) for i in prompts.instances}) == 4
    for corrupted in (False, True):
        found = PairedRuns(model, prompts).margins(corrupted)
        for i, instance in enumerate(prompts.instances):
            ids = torch.tensor([instance.corrupted if corrupted else instance.ids])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, -1].double()
            accept, wrong = instance.accept[0][0], list(instance.wrong[0])
            alone = (
                logits[accept] - logits[wrong].mean() if wrong else logits.log_softmax(-1)[accept]
            )
            assert found[i] == pytest.approx(float(alone), abs=2e-6)  # margins are told in float32


def test_batches_keep_the_order_and_the_limit(pocket: HookedModel, words: list[str]) -> None:
    prompts = from_texts(pocket, [pair(words, n, n) for n in (3, 9, 4, 6, 9, 5)])
    longest = max(len(i.ids) for i in prompts.instances)
    for tokens in (1, longest, 2 * longest, 10_000):
        batches = prompts.batches(pocket, tokens)
        assert [i for b in batches for i in b.rows] == list(range(6))
        for batch in batches:
            assert batch.clean.numel() <= tokens or len(batch.rows) == 1
            for row, mask, instance in zip(batch.clean, batch.mask, batch.instances, strict=True):
                assert tuple(row[mask.bool()].tolist()) == instance.ids
    assert len(prompts.batches(pocket, 10_000)) == 1


# --- what the model can do
# --------------------------------------------------------------------------------------------


def test_a_model_that_cannot_do_the_task_is_refused(worded: Callable[..., Any]) -> None:
    model, _ = worded("llama")
    with pytest.raises(InputError, match=r"can't do ioi .*accuracy 0.00.*--force"):
        circuits.find(model, refused(model), "attribution")
    found = circuits.find(model, refused(model), "attribution", force=True)
    assert found.search.clean.mean <= 0 and any("read with care" in note for note in found.notes)


@pytest.mark.parametrize("task", ["ioi", "greater_than", "docstring", "colored_objects"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_random_models_are_refused_on_every_task(
    worded: Callable[..., Any], name: str, task: str
) -> None:
    """Whichever way their margins happen to fall."""
    model, _ = worded(name)
    with pytest.raises(InputError, match=f"can't do {task}"):
        circuits.find(model, task, "attribution", n=32)


def refused(model: HookedModel) -> Prompts:
    """Problems of which the model prefers the wrong answer: those in which it does, as a random
    model is undecided."""
    prompts = from_task(model, "ioi", 16)
    margins = PairedRuns(model, prompts).margins()
    return Prompts(
        prompts.task, tuple(i for i, m in zip(prompts.instances, margins, strict=True) if m < 0)
    )


def test_without_wrong_answers_the_accuracy_decides(
    worded: Callable[..., Any], words: list[str]
) -> None:
    model, _ = worded("llama")
    rows = [pair(words, 5, seed, wrong=[]) for seed in range(4)]
    with pytest.raises(InputError, match="can't do prompts"):
        circuits.find(model, from_texts(model, rows), "attribution")
    prompts, own = from_texts(model, rows), []
    for (
        instance
    ) in prompts.instances:  # the model's own answers, whose log-probability is below 0 as any
        with torch.no_grad():
            answer = int(model(input_ids=torch.tensor([instance.ids])).logits[0, -1].argmax())
        own.append(dataclasses.replace(instance, accept=((answer,),)))
    found = circuits.find(model, Prompts(prompts.task, tuple(own)), "attribution")
    assert found.search.accuracy.mean == 1 and found.search.clean.mean < 0


def test_a_task_half_done_is_told(pocket: HookedModel) -> None:
    prompts = from_task(pocket, "ioi", 12)
    swapped = [
        dataclasses.replace(i, accept=i.wrong, wrong=i.accept) for i in prompts.instances[:4]
    ]
    mixed = Prompts(prompts.task, (*swapped, *prompts.instances[4:]))
    assert not any(
        "read with care" in note for note in circuits.find(pocket, prompts, "attribution").notes
    )
    found = circuits.find(pocket, mixed, "attribution")
    assert found.search.accuracy.mean == pytest.approx(8 / 12)
    assert any("the model solves 67% of the prompts" in note for note in found.notes)


# --- circuits as tables
# -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(pocket: HookedModel) -> Circuit:
    return circuits.find(pocket, "ioi", "eap", n=8)


def test_a_circuit_is_saved_and_loads_again(found: Circuit, tmp_path: Path) -> None:
    again = Circuit.load(found.save(tmp_path / "circuit"))
    pd.testing.assert_frame_equal(again.frame, found.frame)
    pd.testing.assert_frame_equal(again.edges, found.edges)
    assert again.search == found.search and again.notes == found.notes
    assert again.heads(5) == found.heads(5) and again.about("eap") == found.about("eap")
    # an atlas too
    assert Atlas.load(tmp_path / "circuit").top("eap", 3) == found.heads(3)


def test_damage_is_told(found: Circuit, tmp_path: Path) -> None:
    folder = found.save(tmp_path / "circuit")
    (folder / "edges.parquet").write_bytes(b"other")
    with pytest.raises(OutputError, match="is not the one that"):
        Circuit.load(folder)
    (folder / "circuit.json").write_text('{"format": 1}')
    with pytest.raises(OutputError, match="damaged"):
        Circuit.load(folder)
    (folder / "circuit.json").unlink()
    with pytest.raises(OutputError, match=r"no circuit in .*circuit\.json is missing"):
        Circuit.load(folder)
    with pytest.raises(OutputError, match="There is no"):
        Circuit.load(tmp_path / "gone")


def test_circuits_join_with_an_atlas_on_the_keys(found: Circuit, pocket: HookedModel) -> None:
    keys = list(KEYS)
    frame = found.frame[keys].sample(frac=1, random_state=0).reset_index(drop=True)
    frame["sink"] = frame["layer"] * 100.0 + frame["head"]
    atlas = Atlas(frame, {"model": "pocket-llama"})
    other = circuits.find(pocket, "ioi", "attribution", n=8)
    joined = found.frame.merge(atlas.frame, on=keys).merge(other.frame, on=keys)
    assert len(joined) == len(found.frame)
    assert (joined["sink"] == joined["layer"] * 100 + joined["head"]).all()
    # attribution by the corrupted twin is the sum of a head's outgoing edges
    np.testing.assert_allclose(
        joined["eap_effect"], joined["attribution_effect"], rtol=1e-3, atol=1e-4
    )
