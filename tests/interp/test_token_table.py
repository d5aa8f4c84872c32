"""A tokenizer that knows more tokens than the model embeds: refused wherever tokens enter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

import interp
from interp.circuits.runs.prompts import from_texts
from interp.cli.main import app
from interp.errors import InputError
from interp.tasks.metric import logit_margin
from interp_hooks import HookedModel, hook


@pytest.fixture(scope="module")
def small(tokenizer: Any) -> HookedModel:
    """A model that embeds half of the tokens that its tokenizer knows."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    reader = copy.deepcopy(tokenizer)
    reader.chat_template = template
    model = tiny.build("llama", len(tokenizer) // 2)
    return hook(model, name="small", tokenizer=reader)


def past(model: HookedModel) -> str:
    """A word whose token the model has no row of."""
    reader, size = model.tokenizer, model.module.config.vocab_size
    words = (w for w, i in reader.get_vocab().items() if i >= size and w.startswith("▁"))
    return next(w[1:] for w in words if reader.encode(w[1:], add_special_tokens=False)[0] >= size)


def test_ids_past_the_table_are_refused(small: HookedModel) -> None:
    size = small.module.config.vocab_size
    known = len(small.tokenizer)
    message = rf"small has no token {size}: its embedding table ends at {size - 1}, and .* {known}"
    ids = torch.tensor([[1, 2, size]])
    for run in (
        lambda: small(ids),
        lambda: small(input_ids=ids),
        lambda: small.logits(ids),
        lambda: small.generate(input_ids=ids, max_new_tokens=1),
    ):
        with pytest.raises(InputError, match=message):
            run()
    with pytest.raises(InputError, match="tokens count from 0"):
        small.logits(torch.tensor([[1, -1]]))
    assert small.logits(torch.tensor([[0, size - 1]])).shape[-1] == size


def test_every_way_in_says_it(small: HookedModel, tmp_path: Path) -> None:
    word = past(small)
    row = {"clean": f"{word} a", "corrupted": f"{word} the", "answer": f" {word}"}
    ways = {
        "chat": lambda: small.chat(f"{word} {word}"),
        "a scan of text": lambda: interp.scan_heads(
            small, ["sink", "induction"], context=48, samples=2, progress=False
        ),
        "a task": lambda: interp.evaluate(small, "ioi", n=8, force=True),
        "prompts of a file": lambda: interp.circuits.find(
            small, from_texts(small, [row, row]), "eap", force=True
        ),
        "a rhythm": lambda: interp.rhythm(small, f"{word} {word} {word}"),
    }
    for name, run in ways.items():
        with pytest.raises(InputError, match=r"has no token|no logit of token"):
            run()
            pytest.fail(f"{name} was answered")


def test_special_tokens_added_without_resizing(tokenizer: Any) -> None:
    reader = copy.deepcopy(tokenizer)
    model = hook(tiny.build("llama", len(tokenizer)), name="own", tokenizer=reader)
    reader.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    ids = reader("the cat <|new|>", return_tensors="pt").input_ids
    with pytest.raises(InputError, match="resize_token_embeddings"):
        model.logits(ids)
    model.module.resize_token_embeddings(len(reader))
    assert model.logits(ids).shape[-1] == len(reader)


def test_answers_past_the_logits() -> None:
    with pytest.raises(InputError, match="no logit of token 4"):
        logit_margin(torch.zeros(4), [1, 4], [2])
    with pytest.raises(InputError, match="no logit of token -1"):
        logit_margin(torch.zeros(4), [1], [-1])


def test_placeholders_of_pictures_may_lie_outside(small: HookedModel) -> None:
    from interp_hooks.token_ids import check

    size = small.module.config.vocab_size
    other = hook(tiny.build("llama", size), name="seeing")
    other.module.config.image_token_id = size + 3
    check(other, (torch.tensor([[1, size + 3]]),), {})
    with pytest.raises(InputError):
        check(other, (torch.tensor([[1, size + 4]]),), {})


HALF = "the \udcff cat"  # a byte that is no UTF-8, as Python reads it from a command line


def test_half_a_character_is_refused(small: HookedModel, tmp_path: Path) -> None:
    for run in (
        lambda: interp.rhythm(small, HALF),
        lambda: small.chat(HALF),
        lambda: from_texts(small, [{"clean": HALF, "corrupted": HALF, "answer": " a"}]),
    ):
        with pytest.raises(InputError, match="no character at place 4"):
            run()
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(json.dumps({"text": HALF, "label": n}) for n in ("a", "b")))
    with pytest.raises(InputError, match="only half of one"):
        interp.tasks.get(str(task)).sample(small.tokenizer, 1)


def test_the_command_line_takes_bytes_that_are_no_text() -> None:
    done = CliRunner().invoke(app, ["generate", "--model", "llama", "--prompt", HALF])
    assert done.exit_code == 2 and "only half of one" in done.output
    done = CliRunner().invoke(app, ["show", "gone-\udcff"])
    assert done.exit_code == 2 and "gone-\\udcff" in done.output
