"""`interp generate` with chats: what is said on stderr, what goes to stdout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from chats import END, always, talking
from typer.testing import CliRunner, Result

import interp
from interp.cli.main import app
from interp.errors import InputError
from interp.model import Model
from interp_hooks import hook


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["generate", "--max-new-tokens", "4", *words])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def talker(tokenizer: Any) -> Any:
    return talking(tokenizer)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, talker: Any) -> Any:
    """The model that `interp generate` loads, its tokenizer with a template."""

    def put(module: Any, *stops: str) -> Any:
        eos = talker.convert_tokens_to_ids(list(stops)) or 2
        module.generation_config = hf.GenerationConfig(eos_token_id=eos, pad_token_id=0)
        model = hook(module, name="talker", tokenizer=talker)
        monkeypatch.setattr(interp, "load", lambda *args, **more: model)
        return model

    return put


def test_a_tuned_model_goes_on_unless_it_is_asked_and_a_hint_says_so(
    load: Any, talker: Any
) -> None:
    model = load(tiny.build("llama", len(talker), seed=3), "</s>", END)
    told = run("--prompt", "the dog", "--chat")
    assert told.stdout.strip() == model.chat("the dog", max_new_tokens=4) and told.stderr == ""
    face = model.as_face(Model)
    assert face.generate("the dog", chat=True, max_new_tokens=4).strip() == told.stdout.strip()
    assert face.generate(["the dog"], chat=True, max_new_tokens=4)[0].strip() == told.stdout.strip()
    with pytest.raises(InputError, match="chat=True"):
        face.generate(input_ids=torch.tensor([[1]]), chat=True)
    kind = run("--prompt", "the dog", "--system", "the river")
    assert kind.stdout.strip() == model.chat("the dog", "the river", 4) and kind.stderr == ""
    plain = run("--prompt", "the dog", "--no-chat")
    ids = talker("the dog", return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    text = talker.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert plain.stdout == f"{text}\n" and plain.stderr == ""
    usual = run("--prompt", "the dog")
    assert usual.stdout == plain.stdout == face.generate("the dog", max_new_tokens=4) + "\n"
    assert usual.stderr == "talker is tuned for chat: --chat asks it in its chat template.\n"


def test_a_base_model_with_a_template_is_not_taken_for_a_tuned_one(load: Any, talker: Any) -> None:
    load(tiny.build("llama", len(talker), seed=3), "</s>")
    assert run("--prompt", "the dog").stdout == run("--prompt", "the dog", "--no-chat").stdout
    assert run("--prompt", "the dog").stderr == ""


def test_options_that_do_not_go_together(load: Any, talker: Any, tmp_path: Path) -> None:
    load(tiny.build("llama", len(talker), seed=3), "</s>")
    talker.chat_template = None
    for words in (["--chat"], ["--system", "be kind"]):
        said = run("--prompt", "a", *words, code=2)
        assert "talker has no chat template" in said.output and said.output.count("\n") == 1
    assert "leave out" in run("--prompt", "a", "--no-chat", "--system", "b", code=2).output
    said = run("--prompt", "a", "--image", "x.png", "--chat", code=2)
    assert "processor's own template" in said.output


def test_a_model_that_ends_at_once(load: Any, talker: Any) -> None:
    load(always(2, len(talker)), "</s>")
    base = run("--prompt", "the dog")
    assert base.stdout == ""
    assert "its first token is </s>, which ends a text; try --chat" in base.stderr
    asked = run("--prompt", "the dog", "--chat")
    assert asked.stdout == "" and "try another prompt" in asked.stderr
    blank = talker.encode("\n", add_special_tokens=False)[-1]
    load(always(blank, len(talker)), "</s>")
    assert "nothing but blanks" in run("--prompt", "the dog").stderr


def test_an_edit_by_text(load: Any, talker: Any, tmp_path: Path) -> None:
    load(tiny.build("llama", len(talker), seed=3), "</s>", END)
    edit = dict(edit="scale_tokens", keys="text:the river", gain=0.0)
    path = tmp_path / "edit.json"
    path.write_text(json.dumps(edit))
    words = ["--edit", str(path), "--chat", "--prompt"]
    run(*words, "the dog saw the river")
    said = run(*words, "the dog", code=2)
    assert "'the river' does not occur in the prompt" in said.output
