"""A library that makes the tokenizer anew with a BOS measures the same weights on other inputs: the
atlas, its report and `compare` say so."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch
import transformers as hf
from typer.testing import CliRunner

import interp
from interp.cli.main import app
from interp.results.starting_tokens import difference, remark
from interp.support.provenance import before_text
from interp_hooks import HookedModel, hook

RECORD = dict(before_text=["<s> (1)"], library="transformer_lens")
ASKED = dict(settings={"context": 64}, seed=0, inputs_hash="a")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[HookedModel, HookedModel]:
    """The same random Llama through transformers, whose tokenizer adds no BOS, and through a
    TransformerBridge, which adds one."""
    bridge = pytest.importorskip("transformer_lens.model_bridge")
    folder = tmp_path_factory.mktemp("llama")
    path = tiny_gguf.write(folder / "m.gguf", "llama", tiny_gguf.model("llama"))
    plain = interp.load(path, device="cpu")
    plain.module.save_pretrained(folder)
    plain.tokenizer.save_pretrained(folder)
    reader = hf.AutoTokenizer.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridged = bridge.TransformerBridge.boot_transformers(
            str(folder), hf_model=copy.deepcopy(plain.module), tokenizer=reader, device="cpu"
        )
    return plain, hook(bridged)


def scan(model: HookedModel) -> Any:
    return interp.scan_heads(model, ["sink"], context=32, samples=2, progress=False)


def test_the_report_and_compare_say_it(
    pair: tuple[HookedModel, HookedModel], tmp_path: Path
) -> None:
    plain, bridged = (scan(model) for model in pair)
    bos = "<|end|> (282)"
    assert plain.provenance["before_text"] == [] and plain.notes == []
    assert bridged.provenance["before_text"] == [bos]
    assert any("TransformerLens" in note and bos in note for note in bridged.notes)
    page = bridged.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "TransformerLens makes a model" in page and "Before each text" in page

    said = plain.compare(bridged).attrs["inputs"]
    assert "no special token in the first" in said and f"{bos} in the second" in said
    assert "inputs" not in plain.compare(plain).attrs
    for name, atlas in (("a", plain), ("b", bridged)):
        atlas.save(tmp_path / name)
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert done.exit_code == 0 and "different inputs" in done.output


def test_a_tokenizer_of_ones_own_is_not_remarked_on(
    pair: tuple[HookedModel, HookedModel],
) -> None:
    """On the same ids the two are the same model, and nothing is said."""
    plain, bridged = pair
    same = hook(bridged.module, tokenizer=plain.tokenizer)
    one, other = scan(plain), scan(same)
    assert other.notes == [] and "inputs" not in one.compare(other).attrs
    assert one.provenance["inputs_hash"] == other.provenance["inputs_hash"]
    apart = one.frame["sink"] - other.frame["sink"]
    assert apart.abs().max() < 1e-5


def test_a_remark_needs_the_library_its_tokenizer_and_a_bos() -> None:
    assert len(remark(RECORD, True)) == 1
    assert remark(RECORD, False) == []
    assert remark({**RECORD, "before_text": []}, True) == []
    assert remark({**RECORD, "before_text": None}, True) == []
    assert remark({**RECORD, "library": "transformers"}, True) == []
    assert remark({}, True) == []


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (dict(before_text=["<s> (1)"]), dict(before_text=[]), "no special token in the second"),
        (dict(before_text=["<s> (1)"]), dict(before_text=["<b> (2)"]), "<b> (2) in the second"),
        (dict(before_text=[]), dict(before_text=[]), None),
        (dict(before_text=[]), dict(before_text=None), None),  # a record from before, or no words
        (ASKED, ASKED, None),
        (ASKED, {**ASKED, "inputs_hash": "b"}, "same settings"),
        (ASKED, {**ASKED, "inputs_hash": "b", "seed": 1}, None),  # asked for, and known
        ({}, {}, None),
    ],
)
def test_difference(one: dict[str, Any], other: dict[str, Any], said: str | None) -> None:
    sentence = difference(one, other)
    assert sentence is None if said is None else said in str(sentence)


def test_what_stands_before_a_text() -> None:
    """As the tokenizer's own template has it."""
    data, _ = tiny_gguf.sentencepiece(True)
    vocabulary = {token: i for i, token in enumerate(data["tokens"])}

    def made(template: str | None) -> Any:
        tokenizer = hf.GemmaTokenizer(vocab=vocabulary, merges=[])
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template or "$A", special_tokens=[("<bos>", 2), ("<eos>", 1)]
        )
        return tokenizer

    assert before_text(None) is None
    assert before_text(made(None)) == []
    assert before_text(made("<bos> $A")) == ["<bos> (2)"]
    assert before_text(made("<eos> <bos> $A <eos>")) == ["<eos> (1)", "<bos> (2)"]
    assert before_text(made("$A <eos>")) == []


def test_logits_do_not_depend_on_the_library(pair: tuple[HookedModel, HookedModel]) -> None:
    """What the remark says is of the inputs alone."""
    plain, bridged = pair
    ids = torch.arange(40)[None] + 7
    with torch.no_grad():
        torch.testing.assert_close(plain.logits(ids), bridged.logits(ids), rtol=1e-4, atol=1e-4)
