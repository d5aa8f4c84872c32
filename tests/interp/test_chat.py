"""Chats through a tokenizer's template, with and without edits, and models that end at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from chats import END, always, talking

from interp import edits as E
from interp.errors import InputError
from interp.inputs.tokenizer import Text
from interp_hooks import HookedModel, hook
from interp_hooks.chatting import (
    chat_inputs,
    end_of_turn,
    new_tokens,
    stop_tokens,
    tuned_for_chat,
    why_empty,
)


@pytest.fixture
def talker(tokenizer: Any) -> Any:
    """The pocket tokenizer with a template."""
    return talking(tokenizer)


@pytest.fixture
def model(talker: Any) -> Iterator[HookedModel]:
    module: Any = tiny.build("llama", len(talker), seed=3)
    module.generation_config = hf.GenerationConfig(
        eos_token_id=[2, talker.convert_tokens_to_ids(END)], pad_token_id=0
    )
    yield hook(module, name="talker", tokenizer=talker)


def test_the_answer_to_messages(model: HookedModel, talker: Any) -> None:
    """As transformers makes it of the same messages, one BOS."""
    messages = [
        dict(role="system", content="be kind"),
        dict(role="user", content="the cat saw"),
        dict(role="assistant", content="what"),
        dict(role="user", content="the dog"),
    ]
    inputs = talker.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert inputs["input_ids"].tolist() == chat_inputs(model, messages)["input_ids"].tolist()
    out = model.module.generate(**inputs, max_new_tokens=6, do_sample=False)
    wanted = talker.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.chat(messages, max_new_tokens=6) == wanted.strip() != ""
    assert model.chat(messages[1:], system="be kind", max_new_tokens=6) == wanted.strip()
    assert model.chat("the dog") == model.chat([dict(role="user", content="the dog")])


def test_an_edit_of_the_instruction(model: HookedModel) -> None:
    """Found by its text in the filled-in template; by hand, the same."""
    inputs = chat_inputs(model, "the cat saw the dog", "the river")
    ids = inputs["input_ids"][0].tolist()
    wanted = model.tokenizer.encode(" the river", add_special_tokens=False)[-2:]
    (at,) = (i for i in range(len(ids)) if ids[i : i + 2] == wanted)
    answers = []
    for keys in (E.Span("the river"), E.Span(at, at + 2)):
        with model.edit(E.ScaleTokens(keys, gain=20.0)), model.observe("entropy") as seen:
            said = model.chat("the cat saw the dog", "the river", max_new_tokens=5)
        answers.append((said, seen[1].entropy))
    assert answers[0][0] == answers[1][0]
    assert torch.equal(answers[0][1], answers[1][1])


def test_tuned_or_with_a_template_alone(model: HookedModel, talker: Any) -> None:
    """A model that stops elsewhere than the template's turns is a base model."""
    end = talker.convert_tokens_to_ids(END)
    assert end_of_turn(talker) == end and end in stop_tokens(model)
    assert tuned_for_chat(model)
    model.module.generation_config.eos_token_id = 2
    assert not tuned_for_chat(model)
    model.module.generation_config.eos_token_id = end
    talker.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert end_of_turn(talker) is None and not tuned_for_chat(model)
    talker.chat_template = "{{ raise_exception('alternate!') }}"
    assert not tuned_for_chat(model)
    talker.chat_template = None
    assert not tuned_for_chat(model)


BAD: dict[str, tuple[Any, Any, str]] = {
    "nothing": ([], None, "no message"),
    "blank": (" ", None, "no message"),
    "no messages": (["hello"], None, "like"),
    "answered": (
        [dict(role="user", content="a"), dict(role="assistant", content="b")],
        None,
        "end",
    ),
    "twice": ([dict(role="system", content="a"), dict(role="user", content="b")], "c", "already"),
}


@pytest.mark.parametrize("name", BAD)
def test_chats_that_are_none(model: HookedModel, name: str) -> None:
    messages, system, says = BAD[name]
    with pytest.raises(InputError, match=says):
        model.chat(messages, system)
    with pytest.raises(InputError, match="from 1"):
        model.chat("a", max_new_tokens=0)


def test_templates_that_do_not_take_it(model: HookedModel, talker: Any, tapped: Any) -> None:
    talker.chat_template = "{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="leaves out system"):
        model.chat("a", "be kind")
    with pytest.raises(InputError, match="leaves out system"):
        Text(talker).around_user("be kind")
    talker.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(InputError, match="System role not supported"):
        model.chat("a", "be kind")
    talker.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        model.chat("a")
    with pytest.raises(InputError, match="no tokenizer"):
        tapped("llama")[0].chat("a")


def test_a_model_that_ends_at_once_says_so(talker: Any) -> None:
    ending = hook(always(2, len(talker)), name="ending", tokenizer=talker)
    with pytest.warns(UserWarning, match=r"ending ended at once: its first token is </s>") as told:
        assert ending.chat("the dog") == ""
    assert told[0].filename == __file__
    blank = talker.encode("\n", add_special_tokens=False)[-1]
    gap = hook(always(blank, len(talker)), name="gap", tokenizer=talker)
    with pytest.warns(UserWarning, match="nothing but blanks"):
        assert gap.chat("the dog", max_new_tokens=3) == ""


def test_new_tokens_of_both_kinds_of_model(talker: Any, model: HookedModel) -> None:
    prompt = torch.tensor([[5, 6, 7]])
    assert new_tokens(prompt, torch.tensor([[5, 6, 7, 8]])).tolist() == [8]
    assert new_tokens(prompt, torch.tensor([[0, 6]])).tolist() == [0, 6]
    assert why_empty(model, torch.tensor([], dtype=torch.long)) == "talker wrote no token"
    assert why_empty(model, talker("dog", return_tensors="pt")["input_ids"][0]) is None
