"""Tasks: the right answer by an independent reading of the prompt, for several tokenizers; judging;
batching."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from interp import tasks
from interp.errors import InputError
from interp.evaluation.ablation import controls
from interp.evaluation.evaluate import evaluate
from interp.inputs import lexicon
from interp.inputs.batches import BUDGET
from interp.inputs.text import rows_of_text
from interp.inputs.tokenizer import Text
from interp.support.statistics import bootstrap
from interp.tasks.answers import answer_logits, batches
from interp.tasks.images import ImageTask
from interp.tasks.niah import NeedleInAHaystack
from interp.tasks.task import Instance, collate
from interp_hooks import Head, HookedModel

NAMES = [name for name in tasks.names() if not isinstance(tasks.get(name), ImageTask)]
N, SEED = 12, 3
Tokenizers = dict[str, Any]


def byte_level(words: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `words`, with neither BOS nor padding (as GPT-2's)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


def characters() -> PreTrainedTokenizerFast:
    """A token a character, with an unknown token."""
    vocabulary = {c: i for i, c in enumerate(["<unk>", "\n", *map(chr, range(32, 127))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Any) -> Tokenizers:
    words = [w for k, v in vars(lexicon).items() if k.isupper() and isinstance(v, list) for w in v]
    # every word often enough to become one token, with its leading space, and years as two pairs of
    # digits
    rich = [f" {w}" for w in words for _ in range(40)] + [" positive negative"] * 40
    few = [
        "The old king crossed the river near a tower.",
        "When Mary and John went to the store, John gave a drink.",
    ]
    return {
        "pocket": tokenizer,
        "rich": byte_level(rich, 6000),
        "poor": byte_level(few, 300),
        "characters": characters(),
    }


def made(
    tokenizers: Tokenizers, which: str, name: str, n: int = N, seed: int = SEED
) -> list[Instance]:
    return tasks.get(name).sample(tokenizers[which], n, seed)


# --- independent readings of a prompt: text → (accepted, wrong) words
# -------------------------------------------------


def read_ioi(text: str) -> tuple[set[str], set[str]]:
    people = [w for w in re.findall(r"[A-Z][a-z]+", text) if w in lexicon.NAMES]
    assert len(people) == 3 and len(set(people)) == 2, text
    once, twice = (next(p for p in people if people.count(p) == k) for k in (1, 2))
    assert people[2] == twice
    return {once}, {twice}


def read_colored_objects(text: str) -> tuple[set[str], set[str]]:
    seen = {thing: color for color, thing in re.findall(r"\ban? (\w+) (\w+)[,.]", text)}
    asked = re.search(r"What color is the (\w+)\? Answer:$", text)
    assert asked is not None and len(seen) == 3, text
    return {seen[asked[1]]}, set(seen.values()) - {seen[asked[1]]}


def read_docstring(text: str) -> tuple[set[str], set[str]]:
    signature = re.search(r"def \w+\s?\(self, ([^)]*)\)", text)
    assert signature is not None and text.rstrip().endswith(":param"), text
    arguments = signature[1].split(", ")
    documented = re.findall(r":param (\w+):", text)
    following = arguments[arguments.index(documented[-1]) + 1]
    return {following}, set(arguments) - {following}


def read_classification(text: str) -> tuple[set[str], set[str]]:
    last = text.rsplit("Review:", 1)[1]
    score = sum(w in lexicon.POSITIVE for w in re.findall(r"\w+", last)) - sum(
        w in lexicon.NEGATIVE for w in re.findall(r"\w+", last)
    )
    assert abs(score) in (1, 3) and last.rstrip().endswith("Sentiment:"), text
    labels = ("positive", "negative")
    return {labels[score < 0]}, {labels[score > 0]}


READERS: dict[str, Callable[[str], tuple[set[str], set[str]]]] = dict(
    ioi=read_ioi,
    colored_objects=read_colored_objects,
    docstring=read_docstring,
    classification=read_classification,
)


def words(tokenizer: Any, ids: Sequence[int]) -> set[str]:
    return {tokenizer.decode([i]).strip().strip("▁") for i in ids}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("which", ["pocket", "rich"])
def test_answers_by_reading_the_prompt(tokenizers: Tokenizers, which: str, name: str) -> None:
    tokenizer = tokenizers[which]
    answers = []
    for instance in made(tokenizers, which, name, 40):
        text = tokenizer.decode(instance.ids, skip_special_tokens=True)
        accept, wrong = READERS[name](text)
        assert words(tokenizer, instance.accept[0]) == accept, text
        assert words(tokenizer, instance.wrong[0]) == wrong, text
        answers += accept
    assert len(set(answers)) > (1 if name == "classification" else 5)


@pytest.mark.parametrize("name", ["colored_objects", "classification"])
def test_corrupted_prompts_call_for_another_answer(tokenizers: Tokenizers, name: str) -> None:
    for instance in made(tokenizers, "pocket", name, 40):
        clean, changed = (
            READERS[name](tokenizers["pocket"].decode(ids, skip_special_tokens=True))[0]
            for ids in (instance.ids, instance.corrupted)
        )
        assert not clean & changed


def test_corrupted_ioi_and_docstring_determine_nothing(tokenizers: Tokenizers) -> None:
    decode = tokenizers["pocket"].decode
    for instance in made(tokenizers, "pocket", "ioi", 40):
        people = [
            w for w in re.findall(r"[A-Z][a-z]+", decode(instance.corrupted)) if w in lexicon.NAMES
        ]
        assert len(set(people)) == 3
    for instance in made(tokenizers, "pocket", "docstring", 40):
        text = decode(instance.corrupted)
        signature = re.search(r"\(self, ([^)]*)\)", text)
        assert signature is not None
        answer = words(tokenizers["pocket"], instance.accept[0])
        assert not set(signature[1].split(", ")) & ({*re.findall(r":param (\w+):", text)} | answer)


def test_swapped_ioi_exchanges_the_answer(tokenizers: Tokenizers) -> None:
    from interp.tasks.ioi import IndirectObject

    for instance in IndirectObject(corruption="swap").sample(tokenizers["pocket"], 20, 0):
        accept, wrong = read_ioi(
            tokenizers["pocket"].decode(instance.corrupted, skip_special_tokens=True)
        )
        assert words(tokenizers["pocket"], instance.wrong[0]) == accept
        assert words(tokenizers["pocket"], instance.accept[0]) == wrong


@pytest.mark.parametrize("which", ["pocket", "rich", "characters"])
def test_greater_than(tokenizers: Tokenizers, which: str) -> None:
    """Two digits a token: every later year is right, every other wrong. A digit a token: only the
    tens are judged."""
    tokenizer = tokenizers[which]
    try:
        instances = made(tokenizers, which, "greater_than", 30)
    except InputError as error:
        assert which == "characters" and "single tokens" in str(error)
        return
    for instance in instances:
        text = tokenizer.decode(instance.ids, skip_special_tokens=True)
        found = re.search(r"from the year (\d\d)(\d\d) to the year (\d\d)$", text)
        assert found is not None and found[1] == found[3], text
        later, earlier = (words(tokenizer, ids) for ids in (instance.accept[0], instance.wrong[0]))
        start, width = int(found[2]), len(next(iter(later)))
        span = 10 ** (2 - width)  # years that begin with the same token
        firsts = range(10**width)  # a token is judged where all of its years are later, or none
        assert later == {f"{y:0{width}d}" for y in firsts if y * span > start}
        assert earlier == {f"{y:0{width}d}" for y in firsts if (y + 1) * span - 1 <= start}
        changed = tokenizer.decode(instance.corrupted, skip_special_tokens=True)
        assert re.search(r"from the year \d\d01 to", changed)


@pytest.mark.parametrize("which", ["pocket", "rich"])
def test_needle(tokenizers: Tokenizers, which: str) -> None:
    tokenizer = tokenizers[which]
    task = NeedleInAHaystack(lengths=(128, 256))
    depths = []
    for k, instance in enumerate(task.sample(tokenizer, 10, 0)):
        ids, first = instance.ids, instance.positions[0]
        assert instance.positions == tuple(range(first, first + 4)) and first + 4 == len(ids)
        text = tokenizer.decode(instance.prompt, skip_special_tokens=True)
        asked = re.search(r"Question: What is the secret (\w+) of (\w+)\? Answer:$", text)
        assert asked is not None, text
        said = re.findall(rf"The secret {asked[1]} of {asked[2]} is ([\w ]+?)\.", text)
        assert len(said) == 1 and len(said[0].split()) == 4, text
        answer = [a[0] for a in instance.accept]
        assert [tokenizer.decode([t]).strip() for t in answer] == said[0].split()
        start, stop = instance.info["needle"]
        assert list(ids[start:stop]) == answer == [*ids[first + 1 :], answer[-1]]
        q0, q1 = instance.info["question"]
        assert tokenizer.decode(ids[q0:q1]).strip() == asked[0].removesuffix(" Answer:")
        target = (128, 256)[k % 2]
        assert target - 24 <= instance.info["length"] <= target
        changed = [c for c in range(len(ids)) if ids[c] != instance.corrupted[c]]
        assert changed == list(range(start, stop))
        depths.append(start / len(ids))
    assert (
        np.corrcoef(depths, [i.info["depth"] for i in task.sample(tokenizer, 10, 0)])[0, 1] > 0.95
    )


def test_needle_in_a_file(tokenizers: Tokenizers, tmp_path: Path) -> None:
    path = tmp_path / "hay.txt"
    path.write_text(" ".join(f"The old dog number {i} saw the moon." for i in range(40)))
    instance = NeedleInAHaystack(lengths=(200,), haystack=str(path)).sample(
        tokenizers["pocket"], 1
    )[0]
    assert tokenizers["pocket"].decode(instance.ids).count("old dog number") > 5
    path.write_text("Too short.")
    for bad in (path, tmp_path / "none.txt"):
        with pytest.raises(InputError, match=bad.name):
            NeedleInAHaystack(lengths=(200,), haystack=str(bad)).sample(tokenizers["pocket"], 1)
    with pytest.raises(InputError, match="20 asked for"):
        NeedleInAHaystack(lengths=(20,)).sample(tokenizers["pocket"], 1)


@pytest.mark.parametrize("which", ["pocket", "rich", "poor", "characters"])
def test_induction(tokenizers: Tokenizers, which: str) -> None:
    for instance in made(tokenizers, which, "induction"):
        ids, n, start = instance.ids, instance.info["repeat"], instance.info["start"]
        assert ids[start : start + n] == ids[start + n :]
        assert len(set(ids[start : start + n])) == n  # distinct: what follows a token is determined
        for position, accept in zip(instance.positions, instance.accept, strict=True):
            earlier = max(i for i in range(position) if ids[i] == ids[position])
            assert accept == (ids[earlier + 1],)
        assert instance.corrupted[start + n :] == ids[start + n :]
        assert not any(
            a == b
            for a, b in zip(
                instance.corrupted[start : start + n], ids[start : start + n], strict=True
            )
        )


@pytest.mark.parametrize("which", ["pocket", "rich"])
def test_bigram_backcopy(tokenizers: Tokenizers, which: str) -> None:
    tokenizer = tokenizers[which]
    for instance in made(tokenizers, which, "bigram_backcopy"):
        said = [tokenizer.decode([i]).strip() for i in instance.ids]
        assert instance.positions
        for position, accept in zip(instance.positions, instance.accept, strict=True):
            assert said[position] in lexicon.TRIGGERS
            assert words(tokenizer, accept) == {said[position - 1]}
            assert instance.corrupted[position - 1] != instance.ids[position - 1]
        chain = said[said.index(":") + 1 :] if ":" in said else said
        for k in range(2, len(chain)):  # the rule holds everywhere, judged or not
            if chain[k - 1] in lexicon.TRIGGERS:
                assert chain[k] == chain[k - 2]


# --- any task, any tokenizer
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["pocket", "rich", "poor", "characters"])
@pytest.mark.parametrize("name", NAMES)
def test_every_task_works_or_says_why(tokenizers: Tokenizers, which: str, name: str) -> None:
    tokenizer = tokenizers[which]
    try:
        instances = made(tokenizers, which, name)
    except InputError as error:
        assert which not in ("pocket", "rich")
        assert "\n" not in str(error) and str(error).endswith(".")
        return
    size = len(tokenizer)
    assert len(instances) == N
    for instance in instances:
        assert len(instance.ids) == len(instance.corrupted) and instance.ids != instance.corrupted
        assert all(0 <= t < size for t in (*instance.ids, *instance.corrupted))
        assert len(instance.positions) == len(instance.accept) == len(instance.wrong) > 0
        assert list(instance.positions) == sorted(set(instance.positions))
        assert instance.positions[0] >= 0 and instance.positions[-1] < len(instance.ids)
        for accept, wrong in zip(instance.accept, instance.wrong, strict=True):
            assert accept and not set(accept) & set(wrong)
        if tokenizer.bos_token_id is not None:
            assert (
                instance.ids[0] == tokenizer.bos_token_id
                and tokenizer.bos_token_id not in instance.ids[1:]
            )


@pytest.mark.parametrize("name", NAMES)
def test_seeds(tokenizers: Tokenizers, name: str) -> None:
    long = made(tokenizers, "pocket", name)
    assert made(tokenizers, "pocket", name, 5) == long[:5]  # longer samples extend shorter ones
    assert made(tokenizers, "pocket", name, 5, SEED + 1) != long[:5]
    assert len({i.ids for i in long}) > N // 2


@pytest.mark.parametrize("name", [n for n in NAMES if n != "induction"])
def test_training_documents_are_solved(tokenizers: Tokenizers, name: str) -> None:
    text = Text(tokenizers["pocket"])
    one, two = (tasks.get(name).document(text, np.random.default_rng(s)) for s in (0, 1))
    assert one != two and one == tasks.get(name).document(text, np.random.default_rng(0))
    if name in ("ioi", "colored_objects"):
        body, answer = one.rstrip(".").rsplit(" ", 1)
        assert READERS[name](body)[0] == {answer}


def test_no_tokenizer_is_said() -> None:
    with pytest.raises(InputError, match="tokenizer"):
        tasks.get("ioi").sample(None, 1)


def test_text_rows_wrap_a_short_text(tokenizers: Tokenizers) -> None:
    source = tokenizers["pocket"].encode(
        "The old king crossed the river.", add_special_tokens=False
    )
    for row in rows_of_text(tokenizers["pocket"], "The old king crossed the river.", 60, 4, 0):
        assert len(row) == 60 and row[0] == 1
        body = row[1:]
        start = next(
            s for s in range(len(source)) if body[: len(source)] == source[s:] + source[:s]
        )
        assert body == [source[(start + i) % len(source)] for i in range(59)]


def judged(judge: str) -> Any:
    class Judged(type(tasks.get("induction"))):  # type: ignore[misc]
        pass

    Judged.judge = judge
    return Judged()


def problem(accept: Sequence[Sequence[int]], wrong: Sequence[Sequence[int]]) -> Instance:
    n = len(accept)
    return Instance(
        tuple(range(n)),
        tuple(range(n)),
        tuple(map(tuple, accept)),
        tuple(map(tuple, wrong)),
        tuple(range(n)),
    )


LOGITS = torch.tensor([[1.0, 3.0, 0.0, 2.0, -1.0], [0.5, 0.0, 4.0, 1.0, 2.0]])


@pytest.mark.parametrize(
    ("judge", "accept", "wrong", "correct"),
    [
        ("top1", [[1], [2]], [[], []], 1.0),
        ("top1", [[1], [4]], [[], []], 0.5),
        ("top1", [[0, 1], [0]], [[2], [1]], 0.5),  # token 2 wins over all at the second position
        ("exact", [[1], [2]], [[], []], 1.0),
        ("exact", [[1], [4]], [[], []], 0.0),
        (
            "choice",
            [[3], [4]],
            [[0], [3]],
            1.0,
        ),  # the arg-max is neither, but the accepted one is the larger
        ("choice", [[0], [4]], [[3], [2]], 0.0),
        ("mass", [[1], [2]], [[0, 2, 3, 4], [0, 1, 3, 4]], 1.0),
        ("mass", [[3], [2]], [[0, 1], [4]], 0.5),
    ],
)
def test_judges(
    judge: str, accept: list[list[int]], wrong: list[list[int]], correct: float
) -> None:
    got, margin = judged(judge).score(LOGITS, problem(accept, wrong))
    assert got == correct
    p = LOGITS.double().softmax(-1).numpy()
    rows = LOGITS.double().numpy()
    margins = []
    for i, (good, bad) in enumerate(zip(accept, wrong, strict=True)):
        if judge == "mass":
            margins.append(p[i, good].sum() - p[i, bad].sum())
        elif bad:
            margins.append(rows[i, good].max() - rows[i, bad].mean())
        else:
            margins.append(np.log(p[i, good].max()))
    assert margin == pytest.approx(np.mean(margins), abs=1e-6)


@pytest.mark.parametrize("which", ["ids", "corrupted", "prompt"])
def test_collate_pads_on_the_left(tokenizers: Tokenizers, which: str) -> None:
    instances = made(tokenizers, "pocket", "ioi") + made(tokenizers, "pocket", "niah", 2)
    batch = collate(instances, 2, which)
    rows = [getattr(i, which) for i in instances]
    width = max(map(len, rows))
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(rows), width)
    for row, ids, mask, pads in zip(
        rows, batch.input_ids.tolist(), batch.attention_mask.tolist(), batch.offset, strict=True
    ):
        assert pads == width - len(row)
        assert ids == [2] * pads + list(row)
        assert mask == [0] * pads + [1] * len(row)


def test_batches_keep_order_and_budget(tokenizers: Tokenizers) -> None:
    instances = made(tokenizers, "pocket", "niah", 30) + made(tokenizers, "pocket", "ioi", 30)
    found = list(batches(instances, 0))
    assert [i for b in found for i in b.instances] == instances
    assert 1 < len(found) < len(instances)
    assert all(b.input_ids.numel() <= BUDGET for b in found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_padded_batches_single_rows_and_steps_agree(
    worded: Any, tokenizers: Tokenizers, name: str
) -> None:
    model: HookedModel = worded(name)[0]
    instances = made(tokenizers, "pocket", "ioi", 4) + NeedleInAHaystack(lengths=(96,)).sample(
        tokenizers["pocket"], 2
    )
    together = answer_logits(model, collate(instances, 2))
    steps = answer_logits(model, collate(instances, 2), stepwise=True)
    for instance, batched, stepped in zip(instances, together, steps, strict=True):
        with torch.no_grad():
            alone = worded(name)[1](input_ids=torch.tensor([instance.ids])).logits[
                0, list(instance.positions)
            ]
        torch.testing.assert_close(batched, alone, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(stepped, alone, atol=1e-4, rtol=1e-3)


def test_evaluate_counts_and_pairs(worded: Any) -> None:
    from interp.edits import ScaleHeads

    model: HookedModel = worded("llama")[0]
    result = evaluate(
        model, "classification", [ScaleHeads({"0.0": 3.0, "1.1": -2.0})], n=20, seed=1
    )
    assert result.baseline.n == 20 and len(result.frame) == 20
    assert result.baseline.mean == pytest.approx(result.frame.baseline.mean())
    assert result.difference.mean == pytest.approx(
        (result.frame.edited - result.frame.baseline).mean()
    )
    assert not np.allclose(result.frame.edited_margin, result.frame.baseline_margin)
    again = evaluate(model, "classification", [ScaleHeads({"0.0": 3.0, "1.1": -2.0})], n=20, seed=1)
    assert again.frame.equals(result.frame) and again.difference == result.difference
    same = evaluate(model, "classification", [ScaleHeads({"0.0": 1.0})], n=20, seed=1)
    assert (same.difference.mean, same.difference.low, same.difference.high) == (0, 0, 0)


def test_bootstrap() -> None:
    assert (bootstrap([1.0] * 9).low, bootstrap([1.0] * 9).high) == (1.0, 1.0)
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    interval = bootstrap(values.tolist(), 1)
    assert interval.mean == pytest.approx(values.mean())
    error = values.std(ddof=1) / 20
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_controls_come_from_the_same_layers(worded: Any) -> None:
    model: HookedModel = worded("llama")[0]
    for seed in range(10):
        rng = np.random.default_rng(seed)
        drawn = controls(model, [Head(0, 1), Head(1, 2), Head(1, 3)], [Head(0, 0)], rng)
        assert [h.layer for h in drawn] == [0, 1, 1] and len(set(drawn)) == 3
        assert not set(drawn) & {Head(0, 1), Head(1, 2), Head(1, 3), Head(0, 0)}
    whole_layer = [Head(0, h) for h in range(4)]
    assert [h.layer for h in controls(model, whole_layer, [], np.random.default_rng(0))] == [1] * 4
    assert controls(model, [*whole_layer, Head(1, 0)], [], np.random.default_rng(0)) == []
