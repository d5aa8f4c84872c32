"""GGUF files: loaded weights are the original model's, tokenizers cut text as theirs do, and what
can't be read is said in one sentence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf as reference
import pytest
import tiny_gguf
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, models, pre_tokenizers

import interp
from interp.errors import InterpError, MissingExtraError, ModelError
from interp.models import gguf
from interp.support.provenance import provenance

TEMPLATE = "{% for m in messages %}<|end|>{{ m['role'] }} {{ m['content'] }}{% endfor %}"


def one_sentence(error: pytest.ExceptionInfo[InterpError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """architecture → (its GGUF file, the model that it was written of)."""
    folder = tmp_path_factory.mktemp("gguf")
    made = {}
    for name in tiny_gguf.BUILD:
        module = tiny_gguf.model(name)
        made[name] = tiny_gguf.write(folder / f"{name}.gguf", name, module), module
    return made


def ids_for(module: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(module.config.vocab_size, (2, 48), generator=generator)


@pytest.mark.parametrize("name", tiny_gguf.BUILD)
def test_the_weights_are_the_originals(name: str, files: dict[str, tuple[Path, Any]]) -> None:
    path, module = files[name]
    hooked = interp.load(path, device="cpu")  # the tap is checked on the way
    ids = ids_for(module)
    with torch.no_grad():
        torch.testing.assert_close(hooked.logits(ids), module(ids).logits, rtol=1e-5, atol=1e-5)
    assert (hooked.name, hooked.max_context) == (name, tiny_gguf.CONTEXT)
    assert hooked.origin == {
        "source": "a GGUF file",
        "file": f"{name}.gguf",
        "weights": "F32, read as float32",
    }
    with hooked.observe("entropy") as seen:
        hooked.logits(ids)
    assert seen[1].entropy.shape == (2, tiny_gguf.HEADS, 48)


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0], ids=lambda k: k.name)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_blocks_are_dequantised(name: str, kind: Kind, tmp_path: Path) -> None:
    """As llama.cpp's own routine unpacks them, in a model of the same architecture."""
    module = tiny_gguf.model(name)
    if kind == Kind.Q4_1:  # the writer's quantiser has no such blocks in all versions
        try:
            reference.quants.quantize(torch.ones(2, 32).numpy(), kind)
        except NotImplementedError:
            pytest.skip("this gguf can't write Q4_1")
    path = tiny_gguf.write(tmp_path / "m.gguf", name, module, kind)
    expected = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.ndim == 2:  # rows are cut into blocks, and no row is permuted inside
                blocks = reference.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(reference.quants.dequantize(blocks, kind)))
    hooked = interp.load(path, device="cpu")
    ids = ids_for(module)
    with torch.no_grad():
        logits = hooked.logits(ids)
        torch.testing.assert_close(logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
        assert (logits - module(ids).logits).abs().max() > 1e-3  # it was quantised indeed
    assert hooked.origin["weights"] == f"{kind.name}, dequantised to float32"
    assert "dequantised" in str(hooked.note)
    assert provenance(hooked, 0, {}, [ids])["origin"] == hooked.origin


def test_the_wanted_dtype(files: dict[str, tuple[Path, Any]]) -> None:
    hooked = interp.load(files["qwen2"][0], device="cpu", dtype="bfloat16")
    assert {p.dtype for p in hooked.module.parameters()} == {torch.bfloat16}
    assert hooked.origin["weights"] == "F32, read as bfloat16"


def test_saved_again_it_loads(files: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    path, module = files["gemma3"]
    loaded = gguf.read(path, torch.float32)
    loaded.module.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again, ids = interp.load(tmp_path, device="cpu"), ids_for(module)
    with torch.no_grad():
        torch.testing.assert_close(again.logits(ids), module(ids).logits, rtol=1e-5, atol=1e-5)
    assert again.tokenizer.encode("the cat") == loaded.tokenizer.encode("the cat")
    assert again.origin == {"source": "a folder", "folder": str(tmp_path)}


# tokenizers


def expected_ids(text: str, *first: pre_tokenizers.PreTokenizer) -> list[int]:
    """A byte-level BPE built by hand: `first` cuts, then GPT-2's rule."""
    data, _ = tiny_gguf.byte_level()
    merges = [tuple(m.split(" ")) for m in data["merges"]]
    vocabulary = {token: i for i, token in enumerate(data["tokens"])}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return list(plain.encode(text).ids)


@pytest.mark.parametrize(
    "text", ["the cat saw a dog", " Rome is 2025, 12.5%", "naïve\n\n code  of"]
)
def test_byte_level_tokenizers_cut_as_written(
    text: str, files: dict[str, tuple[Path, Any]]
) -> None:
    tokenizer = interp.load(files["gpt2"][0], device="cpu").tokenizer
    assert tokenizer.encode(text) == expected_ids(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_cut_singly_where_the_file_says_so(tmp_path: Path) -> None:
    """A vocabulary in which "12" is one token, so that the rule shows."""
    module = tiny_gguf.model("llama")
    data, size = tiny_gguf.byte_level()
    merges = [*data["merges"][:-1], "1 2"]
    tokens = [*data["tokens"][: size - 2], "12", data["tokens"][-1]]
    changed = {**data, "merges": merges, "tokens": tokens}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            tiny_gguf.BUILD, "llama", (tiny_gguf.BUILD["llama"][0], lambda: (changed, size))
        )
        single = tiny_gguf.write(tmp_path / "s.gguf", "llama", module, split="smollm")
        joined = tiny_gguf.write(tmp_path / "j.gguf", "llama", module, split="gpt-2")
    ones = interp.load(single, device="cpu").tokenizer
    assert ones.convert_ids_to_tokens(ones.encode("x12 12")) == ["x", "1", "2", "Ġ", "1", "2"]
    both = interp.load(joined, device="cpu")
    assert both.tokenizer.convert_ids_to_tokens(both.tokenizer.encode("x12")) == ["x", "12"]
    assert "rule" not in str(both.note)


def test_an_unknown_rule_is_said(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "m.gguf", "llama", tiny_gguf.model("llama"), split="elvish")
    assert "'elvish'" in str(interp.load(path, device="cpu").note)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_bos_is_added_where_the_file_says_so(
    name: str, files: dict[str, tuple[Path, Any]]
) -> None:
    hooked = interp.load(files[name][0], device="cpu")
    data, _ = tiny_gguf.sentencepiece(True)
    words = [
        data["tokens"][i] for i in hooked.tokenizer.encode("the cat", add_special_tokens=False)
    ]
    assert "".join(words).replace("▁", " ").strip() == "the cat"
    assert hooked.tokenizer.encode("the cat")[0] == data["special"]["bos"]
    assert provenance(hooked, 0, {}, [])["before_text"] == ["<bos> (2)"]


@pytest.mark.parametrize(
    ("split", "says", "adds"),
    [
        ("llama-bpe", None, True),  # Llama 3's files often say nothing, and mean a BOS
        ("llama-bpe", False, False),
        ("llama-bpe", True, True),
        ("gpt-2", None, False),
        ("gpt-2", True, True),
    ],
)
def test_byte_level_tokenizers_add_a_bos_as_llama_cpp_does(
    split: str, says: bool | None, adds: bool, tmp_path: Path
) -> None:
    data, size = tiny_gguf.byte_level()
    end = data["special"]["bos"]
    if says is not None:
        data["add_bos"] = says
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_gguf.BUILD, "llama", (tiny_gguf.BUILD["llama"][0], lambda: (data, size)))
        path = tiny_gguf.write(tmp_path / "m.gguf", "llama", tiny_gguf.model("llama"), split=split)
    tokenizer = gguf.read(path, torch.float32).tokenizer
    expected = [*([end] if adds else []), *expected_ids(" the cat")]
    assert tokenizer.encode(" the cat") == expected
    tokenizer.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).encode(" the cat") == expected


def test_whole_tokens_come_before_merges(tmp_path: Path) -> None:
    """Where llama.cpp ignores merges for a piece that is a token: " Rome" lacks its last merge."""
    data, size = tiny_gguf.byte_level()
    last = next(m for m in data["merges"] if m == "ĠRom e")
    data = {**data, "merges": [m for m in data["merges"] if m != last]}
    cut = {}
    for split in ("llama-bpe", "gpt-2"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(
                tiny_gguf.BUILD, "llama", (tiny_gguf.BUILD["llama"][0], lambda: (data, size))
            )
            path = tiny_gguf.write(
                tmp_path / f"{split}.gguf", "llama", tiny_gguf.model("llama"), split=split
            )
        tokenizer = gguf.read(path, torch.float32).tokenizer
        ids = tokenizer.encode(" Rome", add_special_tokens=False)
        cut[split] = tokenizer.convert_ids_to_tokens(ids)
    assert cut == {"llama-bpe": ["ĠRome"], "gpt-2": ["ĠRom", "e"]}


def test_chat_template_and_ends_survive(tmp_path: Path) -> None:
    path = tiny_gguf.write(
        tmp_path / "m.gguf", "qwen2", tiny_gguf.model("qwen2"), split="qwen2", template=TEMPLATE
    )
    hooked = interp.load(path, device="cpu")
    end = tiny_gguf.byte_level()[0]["special"]["eos"]
    said = hooked.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat"}], tokenize=False
    )
    assert said == "<|end|>user the cat"
    assert hooked.tokenizer.encode(said)[0] == end  # whole, not in pieces
    assert hooked.module.config.eos_token_id == hooked.module.generation_config.eos_token_id == end


# where a file is found


def test_a_folder_with_one_file(files: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    (tmp_path / "only.gguf").symlink_to(files["gpt2"][0])
    assert interp.load(tmp_path, device="cpu").name == "only"


def test_a_folder_with_several_files(files: dict[str, tuple[Path, Any]]) -> None:
    with pytest.raises(ModelError) as error:
        interp.load(files["gpt2"][0].parent)
    assert "gemma2.gguf" in one_sentence(error) and "qwen2.gguf" in str(error.value)


def test_a_file_on_the_hub(
    files: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub as hub

    asked = []

    def download(repository: str, file: str, revision: str | None = None) -> str:
        asked.append((repository, file, revision))
        return str(files["qwen2"][0])

    monkeypatch.setattr(hub, "hf_hub_download", download)
    hooked = interp.load("someone/thing-GGUF:thing.Q8_0.gguf", device="cpu", revision="v1")
    assert asked == [("someone/thing-GGUF", "thing.Q8_0.gguf", "v1")]
    assert hooked.origin["source"] == "Hugging Face hub: someone/thing-GGUF"


def test_a_file_on_the_hub_without_network() -> None:
    with pytest.raises(ModelError) as error:
        interp.load("nobody-here/no-such:file.gguf")
    assert "nobody-here/no-such" in one_sentence(error) and "network" in str(error.value)


# what can't be read


def test_no_such_file() -> None:
    with pytest.raises(ModelError) as error:
        interp.load("nowhere/at/all.gguf")
    assert "owner/name:file.gguf" in one_sentence(error)


def test_another_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError) as error:
        interp.load(tmp_path / "notes.txt")
    one_sentence(error)


@pytest.mark.parametrize("content", ["empty", "other", "head", "half", "tail"])
def test_broken_files(content: str, files: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    whole = files["llama"][0].read_bytes()
    broken = dict(
        empty=b"", other=b"PK" * 500, head=whole[:30], half=whole[:5000], tail=whole[:-400]
    )
    (tmp_path / "m.gguf").write_bytes(broken[content])
    with pytest.raises(ModelError) as error:
        interp.load(tmp_path / "m.gguf")
    assert "GGUF" in one_sentence(error)


def test_an_architecture_transformers_cannot_read(tmp_path: Path) -> None:
    writer = reference.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_tensor("token_embd.weight", torch.ones(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError) as error:
        interp.load(tmp_path / "m.gguf")
    text = one_sentence(error)
    assert "rwkv7" in text and "llama" in text and "gemma2" in text and "tokenizer" not in text


def test_a_part_of_a_file(files: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00002.gguf").symlink_to(files["llama"][0])
    part = tmp_path / "m-00002-of-00002.gguf"
    part.write_bytes(files["llama"][0].read_bytes())
    with pytest.raises(ModelError) as error:
        interp.load(part)
    assert "merge" in one_sentence(error)


def test_missing_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_gguf.tensors

    def some(architecture: str, module: Any) -> Any:
        return (pair for pair in whole(architecture, module) if "blk.1.attn_q" not in pair[0])

    monkeypatch.setattr(tiny_gguf, "tensors", some)
    path = tiny_gguf.write(tmp_path / "m.gguf", "llama", tiny_gguf.model("llama"))
    with pytest.raises(ModelError) as error:
        interp.load(path)
    assert "q_proj" in one_sentence(error)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_the_package(
    package: str, files: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = gguf.find_spec
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(MissingExtraError) as error:
        interp.load(files["llama"][0])
    assert f"pip install {package}" in one_sentence(error)


def test_scales_that_no_key_tells_are_said() -> None:
    """Gemma's 27B models scale queries by their own width, which only their size tells."""
    said = {"gemma3.block_count": "62", "gemma2.block_count": "26"}
    assert list(gguf._unread("gemma3", set(), set(), said.get))
    assert not list(gguf._unread("gemma2", set(), set(), said.get))


def test_what_is_passed_over_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3's scaled frequencies stand in a tensor that transformers does not read."""
    whole = tiny_gguf.tensors

    def more(architecture: str, module: Any) -> Any:
        yield from whole(architecture, module)
        yield "rope_freqs.weight", torch.full((8,), 4.0)

    monkeypatch.setattr(tiny_gguf, "tensors", more)
    path = tiny_gguf.write(tmp_path / "m.gguf", "llama", tiny_gguf.model("llama"))
    assert "rope_freqs.weight" in str(interp.load(path, device="cpu").note)
