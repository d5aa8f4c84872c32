"""How problems are put to a model: formats, tokenizers that put a space first, tasks of one's own
files, natural English, and the floor below which nothing is measured."""

from __future__ import annotations

import json
import re
import sysconfig
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import interp
from interp import tasks
from interp.errors import FloorError, InputError
from interp.inputs import english, lexicon
from interp.inputs.text import code_rows, rows_of_text
from interp.inputs.tokenizer import Text
from interp.tasks import posing
from interp.tasks.floor import at_floor
from interp.tasks.needle import Needle, recall
from interp.tasks.niah import NeedleInAHaystack
from interp.tasks.task import Task

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [w for k, v in vars(lexicon).items() if k.isupper() and isinstance(v, list) for w in v]
CORPUS = [
    *[" positive negative place tool"] * 40,
    *(f"the {w} and {w} of {w} is {w}" for w in WORDS for _ in range(8)),
    *english.passages(),
]


@pytest.fixture(scope="module")
def natural() -> Any:
    """A byte-level tokenizer that knows English, with a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=6000, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def prepending() -> Any:
    """A tokenizer that puts a space before every text, as Llama 2's."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=special, show_progress=False)
    code = [f"(self, {w}, {w}):\n :param {w}: {w}" for w in WORDS for _ in range(8)]
    core.train_from_iterator([*CORPUS, *code], trainer)
    core.pre_tokenizer = None
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_a_word_is_one_token_in_context_however_texts_begin(prepending: Any) -> None:
    text = Text(prepending)
    assert len(prepending.encode(" Paris", add_special_tokens=False)) == 2  # the trap
    in_context = prepending.encode("the Paris", add_special_tokens=False)
    assert text.encode(" Paris") == in_context[1:]
    assert text.pool(lexicon.CITIES, 2) == lexicon.CITIES


@pytest.mark.parametrize("name", ["niah", "ioi", "docstring", "colored_objects", "classification"])
def test_every_task_can_be_posed_to_it(name: str, prepending: Any) -> None:
    for instance in tasks.get(name).sample(prepending, 3, 0):
        whole = prepending.decode([*instance.prompt, instance.accept[0][0]])
        again = prepending.encode(whole, add_special_tokens=False)
        assert again[-1] == instance.accept[0][0]  # the answer is what stands there in a text


def test_formats_of_the_needle(natural: Any) -> None:
    task = NeedleInAHaystack(lengths=(256,))
    shown = {}
    for form in NeedleInAHaystack.formats:
        (instance,) = replace(task, format=form).sample(natural, 1, 5)
        shown[form] = natural.decode(instance.prompt)
        start, stop = instance.info["needle"]
        said = natural.decode(instance.ids[start:stop])
        asked = natural.decode(instance.ids[slice(*instance.info["question"])])
        fact, city = re.search(r"What is the secret (\w+) of (\w+)\?", asked).groups()  # type: ignore[union-attr]
        if form == "paper":
            assert said.startswith(f" The secret {fact} of {city} is") and said.endswith(".")
        else:
            answer = natural.decode([a[0] for a in instance.accept])
            assert said == answer and f"The secret {fact} of {city} is{answer}." in shown[form]
    assert shown["bare"].endswith("Answer:")
    assert re.search(r"Answer: The secret \w+ of \w+ is$", shown["lead"])
    assert shown["few-shot"].count("Answer:") == 4
    assert shown["few-shot"].split("Question:")[-1] == shown["bare"].split("Question:")[-1]
    user, _, lead = shown["chat"].partition("<|end|>\n<|assistant|>")
    assert user.startswith("<|user|>") and re.fullmatch(r"The secret \w+ of \w+ is", lead)
    assert shown["paper"].startswith("<|user|><book>")
    assert "\n</book>\nBased on the content of the book, Question:" in shown["paper"]
    assert shown["paper"].endswith("\nAnswer:<|end|>\n<|assistant|>")


@pytest.mark.parametrize("name", ["ioi", "colored_objects", "classification", "docstring"])
def test_formats_of_single_answers(name: str, natural: Any) -> None:
    task = tasks.get(name)
    prompts, answers = {}, {}
    for form in task.formats:
        (instance,) = replace(task, format=form).sample(natural, 1, 2)
        prompts[form] = natural.decode(instance.ids)
        answers[form] = {natural.decode([t]).strip().lower() for t in instance.accept[0]}
        assert len(instance.ids) == len(instance.corrupted)
    bare = prompts["bare"]
    assert prompts["few-shot"].endswith(f".\n\n{bare}")
    assert prompts["few-shot"].count(".\n\n") == 4
    assert bare in prompts["chat"].partition("<|end|>")[0]
    assert answers["few-shot"] == answers["bare"] and answers["bare"] <= answers["chat"]
    if "lead" in prompts:
        assert prompts["lead"].startswith(bare) and prompts["lead"].endswith(" is")


def test_a_format_that_a_task_or_tokenizer_lacks(natural: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="induction has no format 'lead'; it has bare"):
        replace(tasks.get("induction"), format="lead")
    with pytest.raises(InputError, match="no chat template"):
        replace(tasks.get("ioi"), format="chat").sample(tokenizer, 1)


class Sees:
    """A model of which only the tokenizer and the length are looked at."""

    max_context = None

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer


@pytest.mark.parametrize(
    ("solved", "chosen", "note"),
    [
        (
            dict(bare=8),
            "bare",
            "niah: asked in the format bare, which solved 8 of 8 trial problems beforehand",
        ),
        (
            dict(bare=0, lead=8),
            "lead",
            "niah: asked in the format lead, which solved 8 of 8 trial problems beforehand "
            "(bare 0)",
        ),
        (
            dict(zip(("bare", "lead", "few-shot", "chat"), (5, 6, 6, 7), strict=True)),
            "chat",
            "niah: asked in the format chat, which solved 7 of 8 trial problems beforehand "
            "(bare 5, lead 6, few-shot 6)",
        ),
        (
            dict(zip(("bare", "lead", "few-shot", "chat"), (5, 6, 6, 6), strict=True)),
            "bare",  # one more of eight is chance
            "niah: asked in the format bare, which solved 5 of 8 trial problems beforehand "
            "(lead 6, few-shot 6, chat 6)",
        ),
    ],
)
def test_the_format_that_is_understood_is_taken(
    solved: dict[str, int], chosen: str, note: str, natural: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(model: Any, task: Task, problems: list[Any]) -> list[tuple[float, float]]:
        hits = solved[task.format]
        return [(float(i < hits), 0.0) for i in range(len(problems))]

    monkeypatch.setattr(posing, "judge", judge)
    found = posing.pose(Sees(natural), tasks.get("niah"))  # type: ignore[arg-type]
    assert (found.task.format, found.note) == (chosen, note)


def test_a_named_format_is_not_tried(natural: Any) -> None:
    found = posing.pose(Sees(natural), tasks.get("niah"), "few-shot")  # type: ignore[arg-type]
    assert found.task.format == "few-shot" and found.note is None


def test_needles_of_ones_own(natural: Any) -> None:
    own = Needle.of("The best thing to do in San Francisco is eat a sandwich.")
    assert own.question == "What is the best thing to do in San Francisco?"
    assert Needle.of("Rome eats | soup", "What does Rome eat?").lead == "Rome eats"
    for fact in ("Rome eats soup", "Rome eats | soup"):
        with pytest.raises(InputError, match=r"needle"):
            Needle.of(fact)
    task = NeedleInAHaystack(lengths=(200,), needle="The best drink in Rome is cold water.")
    for instance in task.sample(natural, 3, 0):
        assert "The best drink in Rome is cold water." in natural.decode(instance.prompt)
        assert len(instance.ids) == len(instance.corrupted)
    with pytest.raises(InputError, match="echo"):
        replace(task, format="paper").sample(natural, 1)


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), min_size=1))
def test_recall_is_rouge_1(said: list[str], wanted: list[str]) -> None:
    left, hits = list(said), 0
    for word in wanted:  # each word said pays for one word wanted
        if word in left:
            left.remove(word)
            hits += 1
    assert recall(" ".join(said).upper(), ", ".join(wanted)) == pytest.approx(hits / len(wanted))


def test_paper_problems_are_judged_by_what_is_said(natural: Any) -> None:
    task = NeedleInAHaystack(lengths=(256,), format="paper")
    (instance,) = task.sample(natural, 1, 0)
    wanted = instance.info["wanted"]
    assert len(wanted.split()) == 14 and instance.info["steps"] == 50
    right = natural.encode(f" It is this: {wanted}", add_special_tokens=False)
    echo = natural.encode(" ".join(wanted.split()[:6]), add_special_tokens=False)
    assert task.heard(natural, instance, right) == (1.0, 0.5)
    assert task.heard(natural, instance, echo)[0] == 0.0  # the question alone is not enough


@given(st.integers(1, 60), st.floats(0, 0.9), st.data())
def test_the_floor_is_the_binomial_test(n: int, chance: float, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    p = Fraction(max(chance, 0.01))
    tail = sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(hits, n + 1))
    if abs(float(tail) - 0.2) > 1e-9:
        assert at_floor(hits, n, chance) == (tail > Fraction(1, 5))


@pytest.fixture(scope="module")
def untrained(tokenizer: Any) -> Any:
    model = tiny.build("llama", len(tokenizer), seed=1, max_position_embeddings=2048)
    return interp.load(model, tokenizer=tokenizer)


def test_no_result_from_a_model_that_cant(untrained: Any) -> None:
    said = r"can't do ioi in the format \w+: accuracy 0.00 of 16 .*it should say '.+' and said '"
    with pytest.raises(FloorError, match=said):
        interp.evaluate(untrained, "ioi", n=16)
    with pytest.raises(FloorError, match="--force"):
        interp.ablate(untrained, "L0H0", task="ioi", n=16)
    with pytest.raises(FloorError):
        interp.calibrate(untrained, "zerotuning", "ioi", n=16)
    with pytest.raises(FloorError, match="circuit"):
        interp.circuits.find(untrained, "ioi", "eap", n=16)


def test_forced_results_are_marked(untrained: Any) -> None:
    found = interp.evaluate(untrained, "ioi", n=16, force=True)
    assert found.baseline.mean == 0 and any("(force)" in note for note in found.notes)
    assert found.provenance["settings"]["at_floor"] is True
    taken = interp.ablate(untrained, "L0H0", task="ioi", n=16, force=True)
    assert any("(force)" in note for note in taken.notes)


def test_scores_of_needles_only_where_they_are_found(untrained: Any) -> None:
    asked = dict(scores="retrieval,qr,sink", context=128, samples=4, progress=False)
    atlas = interp.scan_heads(untrained, **asked)
    assert atlas.frame[["retrieval", "qr"]].isna().all(axis=None)
    assert atlas.frame["sink"].notna().all()
    for name in ("retrieval", "qr"):
        assert any(n.startswith(f"{name}: not measured.") and "said" in n for n in atlas.notes)
    forced = interp.scan_heads(untrained, **asked, force=True)
    assert forced.frame["qr"].notna().all() and any("(force)" in n for n in forced.notes)


def test_own_ids_need_no_tokenizer() -> None:
    model = interp.load(tiny.build("llama", 101, seed=2))
    assert model.tokenizer is None
    ids = torch.randint(3, 101, (3, 40), generator=torch.Generator().manual_seed(0))
    atlas = interp.scan_heads(model, "sink,retrieval", inputs=ids, progress=False)
    eager = tiny.attentions(tiny.eager(tiny.build("llama", 101, seed=2)), input_ids=ids)[0]
    wanted = torch.stack([a.double()[..., 0].mean(-1).mean(0) for a in eager])  # (layers, heads)
    found = torch.tensor(atlas.frame["sink"].to_numpy()).reshape(wanted.shape)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    assert any("tokenizer" in note for note in atlas.notes)
    with pytest.raises(InputError, match="inputs="):
        interp.scan_heads(model, "sink", progress=False)


def rows(path: Path, records: list[dict[str, str]], lines: bool = True) -> str:
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.write_text(text)
    return str(path)


def test_a_classification_of_ones_own(natural: Any, tmp_path: Path) -> None:
    records = [
        dict(text=f"the {w} is here", label="positive" if i % 3 else "negative")
        for i, w in enumerate(lexicon.NOUNS[:30])
    ]
    task = tasks.get(rows(tmp_path / "mine.jsonl", records))
    assert (task.name, task.chance) == ("mine", 2 / 3)  # always the most frequent label
    seen = set()
    for instance in task.sample(natural, 30, 0):
        record = records[instance.info["row"]]
        seen.add(instance.info["row"])
        assert natural.decode(instance.ids) == f"Review: {record['text']}\nSentiment:"
        assert natural.decode([instance.accept[0][0]]) == f" {record['label']}"
        start, stop = instance.info["text"]
        assert natural.decode(instance.ids[start:stop]) == f" {record['text']}"
        assert len(instance.ids) == len(instance.corrupted) and instance.ids != instance.corrupted
    assert len(seen) == 30  # none twice
    (shot,) = replace(task, shots=2).sample(natural, 1, 0)
    assert natural.decode(shot.ids).count("Sentiment:") == 3
    with pytest.raises(InputError, match="30 texts and 31"):
        task.sample(natural, 31, 0)


def test_other_labels_are_named(natural: Any, tmp_path: Path) -> None:
    records = [
        dict(text=f"a {w}", label="tool" if i % 2 else "place") for i, w in enumerate("abcd")
    ]
    task = tasks.get(rows(tmp_path / "kinds.json", records, lines=False))
    (instance,) = task.sample(natural, 1, 0)
    prompt = natural.decode(instance.ids)
    assert prompt.startswith("Label each text as place or tool.\n\nText: a ")
    assert prompt.endswith("\nLabel:")


def test_a_relation_of_ones_own(natural: Any, tmp_path: Path) -> None:
    records = [dict(input=a, output=b) for a, b in zip(lexicon.CITIES, lexicon.NOUNS, strict=False)]
    task = tasks.get(rows(tmp_path / "pairs.json", records, lines=False))
    known = {r["input"]: r["output"] for r in records}
    for instance in task.sample(natural, 3, 0):
        prompt = natural.decode(instance.prompt)
        pairs = re.findall(r"Q: (.+)\nA: (.+)\n\n", prompt)
        assert len(pairs) == 10 and all(known[a] == b for a, b in pairs)
        assert prompt.endswith(f"Q: {instance.info['input']}\nA:")
        answer = natural.decode([a[0] for a in instance.accept])
        assert answer == f" {known[instance.info['input']]}"
        mixed = re.findall(r"Q: (.+)\nA: (.+)\n\n", natural.decode(instance.corrupted))
        assert sorted(b for _, b in mixed) == sorted(b for _, b in pairs)
        assert all(known[a] != b for a, b in mixed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"', "neither a JSON list"),
        ('{"text": "a", "label": ""}\n{"text": "b", "label": "x"}', "Row 1"),
        ('{"text": "a", "label": "x"}', "at least two"),
        ('{"a": "b"}\n{"a": "c"}', "neither"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}', "same label"),
    ],
)
def test_files_that_hold_no_task(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        tasks.get(str(path))


def test_running_text_is_english_where_it_is_known(natural: Any, tokenizer: Any) -> None:
    assert Text(natural).natural and not Text(tokenizer).natural
    first, second = (natural.decode(r) for r in rows_of_text(natural, None, 400, 2, 0))
    assert any(first.startswith(p[:40]) for p in english.passages())
    assert first != second
    assert rows_of_text(natural, None, 400, 1, 0) == [rows_of_text(natural, None, 400, 2, 0)[0]]
    with pytest.raises(InputError, match="--text"):
        rows_of_text(natural, None, 10**6, 1, 0)


def test_code_is_the_standard_librarys(natural: Any) -> None:
    (row,) = code_rows(natural, 200, 1, 3)
    said = natural.decode(row)
    folder = Path(sysconfig.get_path("stdlib"))
    assert any(p.read_text(errors="replace").startswith(said[:60]) for p in folder.glob("*.py"))
    assert np.array_equal(row, code_rows(natural, 200, 2, 3)[0])
