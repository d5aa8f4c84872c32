"""Edits baked into checkpoints: what transformers alone then computes, against hooks that rewrite z
in an untouched eager model."""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from prompts import hooked_transformer
from safetensors.torch import load_file
from typer.testing import CliRunner

import interp
from interp.cli.main import app
from interp.edits import ACT, VHR, Ablate, ScaleHeads, Temperature, ZeroTuning
from interp.edits.fold import Affine, composed
from interp.errors import EditError, HeadError, InputError, OutputError

IDS = torch.arange(3, 33)[None] * 7 % 101
GAINS = {"L0H1": 0.0, "L1H3": 1.7, "L1H0": -0.5}
#: no place for an offset in these, under any config that is known here
WITHOUT_BIAS = {"phi3"}


def again(folder: Path) -> torch.Tensor:
    """Logits by transformers alone."""
    return hf.AutoModelForCausalLM.from_pretrained(folder).eval()(IDS, use_cache=False).logits


def under(plain: Any, changes: dict[int, Any]) -> torch.Tensor:
    """Logits of an eager model with z rewritten before W_O, layer by layer."""
    with ExitStack() as stack, torch.no_grad():
        for layer, change in changes.items():
            stack.enter_context(tiny.rewriting_z(plain, layer, change))
        return plain(IDS, use_cache=False).logits


def scaled(layer: int) -> Any:
    gains = torch.ones(4)
    for name, gain in GAINS.items():
        head = interp.Head.parse(name)
        if head.layer == layer:
            gains[head.head] = gain
    return lambda z: z * gains[:, None]


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_gains_are_in_the_weights(name: str, tmp_path: Path) -> None:
    module = tiny.build(name)
    plain, before = tiny.eager(module), copy.deepcopy(module.state_dict())
    folder = interp.export(module, [ScaleHeads(GAINS)], tmp_path / "baked")
    wanted = under(plain, {layer: scaled(layer) for layer in (0, 1)})
    torch.testing.assert_close(again(folder), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(wanted, under(plain, {}), atol=1e-2)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_a_mean_stands_in_the_bias(name: str, tmp_path: Path) -> None:
    """Or, where no bias has a place, that is said."""
    module = tiny.build(name)
    if name == "mistral":  # its window is shorter than the text; without one it is a Llama
        module = tiny.build(name, sliding_window=None)
    plain, text = tiny.eager(module), tmp_path / "reference.txt"
    text.write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 40, encoding="utf-8")
    model = interp.load(module, tokenizer=words())
    edit = Ablate(["L0H2", "L1H1"], mode="mean", reference=text)
    if name in WITHOUT_BIAS:
        with pytest.raises(InputError, match="no bias of its output projections"):
            interp.export(model, [edit], tmp_path / "baked")
        assert not (tmp_path / "baked").exists()
        return
    pools = edit.bind(model).pools  # type: ignore[attr-defined]
    folder = interp.export(model, [edit], tmp_path / "baked")

    def replaced(layer: int, head: int) -> Any:
        def change(z: torch.Tensor) -> torch.Tensor:
            z = z.clone()
            z[:, :, head] = pools[layer].mean(0)[head]
            return z

        return change

    wanted = under(plain, {0: replaced(0, 2), 1: replaced(1, 1)})
    torch.testing.assert_close(again(folder), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(wanted, under(plain, {}), atol=1e-3)


def words() -> Any:
    """A tokenizer of 101 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, **{f"w{i}": i for i in range(1, 101)}}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def test_edits_are_baked_in_their_order(tmp_path: Path) -> None:
    """A gain after an ablation by the mean scales the mean; before it, it does nothing."""
    module, text = tiny.build("llama"), tmp_path / "reference.txt"
    text.write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 40, encoding="utf-8")
    model = interp.load(module, tokenizer=words())
    mean = Ablate(["L1H1"], mode="mean", reference=text)
    gain = ScaleHeads({"L1H1": 3.0, "L1H2": 0.5})
    for name, edits in (("one", [mean, gain]), ("two", [gain, mean])):
        folder = interp.export(model, edits, tmp_path / name)
        with model.edit(*edits):
            wanted = model.logits(IDS)
        torch.testing.assert_close(again(folder), wanted, atol=1e-4, rtol=1e-4)
    one, two = (again(tmp_path / name) for name in ("one", "two"))
    assert not torch.allclose(one, two, atol=1e-3)


def test_latent_attention(tmp_path: Path) -> None:
    """DeepSeek's values are of another width than its keys."""
    config = hf.DeepseekV3Config(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=48, max_position_embeddings=128, q_lora_rank=None,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    module = hf.AutoModelForCausalLM.from_config(config).eval()
    plain = tiny.eager(module)
    folder = interp.export(module, [ScaleHeads(GAINS)], tmp_path / "baked")
    wanted = under(plain, {layer: scaled(layer) for layer in (0, 1)})
    torch.testing.assert_close(again(folder), wanted, atol=1e-4, rtol=1e-4)


def test_half_precision_says_how_far_it_is(tmp_path: Path) -> None:
    module = tiny.build("llama").to(torch.bfloat16)
    folder = interp.export(module, [ScaleHeads(GAINS)], tmp_path / "baked")
    record = json.loads((folder / "interp-export.json").read_text(encoding="utf-8"))
    assert 0 <= record["differs"] < 0.3 < record["moves"]
    held = load_file(folder / "model.safetensors")
    assert {t.dtype for t in held.values()} == {torch.bfloat16}


def test_the_record_says_what_was_done(tmp_path: Path) -> None:
    model, edit = interp.load("llama"), ScaleHeads({"L2H3": 0.0})
    folder = interp.export(model, edit, tmp_path / "baked")
    record = json.loads((folder / "interp-export.json").read_text(encoding="utf-8"))
    assert interp.edits.from_json(record["edits"]) == [edit]
    assert record["base"]["model"] == "pocket-llama" and len(record["base"]["weights_hash"]) == 32
    assert record["differs"] < 1e-4 < record["moves"]
    baked = interp.load(folder)
    with model.edit(edit):
        text = model.generate("Mary and John went", max_new_tokens=12)
    assert baked.generate("Mary and John went", max_new_tokens=12) == text


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (Temperature(0.5), "depends on the prompt"),
        (ZeroTuning(2.0), "depends on the prompt"),
        (ACT(), "depends on the prompt"),
        (VHR(heads="L1H1"), "depends on the prompt"),
        (Ablate(["L1H1"], mode="uniform"), "zero and mean can"),
        (Ablate(["L1H1"], scope="prefill"), "act on every token"),
        (ScaleHeads({"L1H1": 0.0}, queries=(4, None)), "act on every token"),
    ],
)
def test_what_does_not_fold_is_refused(edit: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(EditError, match=sentence):
        interp.export(tiny.build("llama"), [edit], tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_every_edit_folds_or_says_why() -> None:
    """An edit that is written tomorrow is refused, not passed over."""
    silent = [
        n for n in interp.edits.names() if not hasattr(interp.edits.registry.get(n), "folded")
    ]
    assert not silent


def test_models_and_places_that_can_t_be(tmp_path: Path) -> None:
    edit = ScaleHeads({"L0H0": 0.0})
    with pytest.raises(InputError, match="transformers model"):
        interp.export(hooked_transformer(tiny.build("llama")), [edit], tmp_path / "a")
    with pytest.raises(HeadError):
        interp.export(tiny.build("llama"), [ScaleHeads({"L9H0": 0.0})], tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match="is there already"):
        interp.export(tiny.build("llama"), [edit], tmp_path / "full")
    interp.export(tiny.build("llama"), [edit], tmp_path / "full", overwrite=True)
    assert not (tmp_path / "full" / "mine.txt").exists()
    with pytest.raises(EditError, match="is not an edit"):
        interp.export(tiny.build("llama"), ["L0H0"], tmp_path / "c")  # type: ignore[list-item]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]  # nothing half written


def test_an_adapter_is_to_be_merged_first(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny.build("llama"), config)
    with pytest.raises(InputError, match="merge_and_unload"):
        interp.export(wrapped, [ScaleHeads({"L0H0": 0.0})], tmp_path / "baked")
    merged = wrapped.merge_and_unload()
    interp.export(merged, [ScaleHeads({"L0H0": 0.0})], tmp_path / "baked")


def test_a_checkpoint_that_is_not_the_same_is_not_kept(tmp_path: Path, monkeypatch: Any) -> None:
    """The proof is of logits: weights that were folded wrongly don't pass it."""
    from interp.baking import export as module

    own = module.folded_weights

    def wrong(model: Any, folds: Any) -> Any:
        weights, biases = own(model, folds)
        return {name: weight * 1.1 for name, weight in weights.items()}, biases

    monkeypatch.setattr(module, "folded_weights", wrong)
    with pytest.raises(OutputError, match="gives other logits"):
        interp.export(tiny.build("llama"), [ScaleHeads(GAINS)], tmp_path / "baked")
    assert not list(tmp_path.iterdir())


floats = st.floats(-3, 3)


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=5), floats)
def test_composing_is_doing_one_after_the_other(steps: list[tuple[float, float]], z: float) -> None:
    folds = [
        {0: Affine(torch.tensor([g]).double(), torch.tensor([[b]]).double())} for g, b in steps
    ]
    made = composed(folds)[0]  # type: ignore[arg-type, index]
    wanted = z
    for g, b in steps:
        wanted = np.float32(g) * wanted + np.float32(b)
    assert made.offset is not None
    assert float(made.gain[0]) * z + float(made.offset[0, 0]) == pytest.approx(wanted, abs=1e-4)


def test_on_the_command_line(tmp_path: Path) -> None:
    file = interp.edits.save(tmp_path / "edits.json", [Ablate(["L2H3"])])
    arguments = ["export", "--edit", str(file), "--out", str(tmp_path / "baked")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and (tmp_path / "baked" / "config.json").is_file()
    assert "Ablate L2H3" in done.stderr and "logits differ by" in done.stderr
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "is there already" in again.stderr
    interp.edits.save(file, [Temperature(0.5)])
    refused = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert refused.exit_code == 2 and "can't be baked" in refused.stderr
