"""Objects and folders of every kind load: encoder-decoders, speech, pictures, sound, task heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import BASE, GQA

import interp
from interp.edits import Ablate
from interp.errors import InputError, TapError
from interp.models.classes import class_of
from interp_hooks.logits import logits_of

BART = dict(
    vocab_size=101,
    d_model=32,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    init_std=0.2,
    decoder_start_token_id=2,
)
WAVES = dict(
    BASE,
    vocab_size=32,
    conv_dim=[16, 16],
    conv_stride=[5, 4],
    conv_kernel=[10, 8],
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    mask_time_prob=0.0,
)
PICTURE = dict(BASE, image_size=16, patch_size=8)

#: name → (the model, its towers)
KINDS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=101,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
        ["encoder", ""],
    ),
    "bart": (
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                **BART,
                encoder_layers=3,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=4,
            )
        ),
        ["encoder", ""],
    ),
    "whisper": (
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                vocab_size=101,
                d_model=32,
                encoder_layers=1,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_source_positions=8,
                max_target_positions=32,
                num_mel_bins=4,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                suppress_tokens=None,
                begin_suppress_tokens=None,
                init_std=0.2,
            )
        ),
        ["encoder", ""],
    ),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**PICTURE)), [""]),
    "clip": (
        lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config=dict(BASE, vocab_size=101, eos_token_id=2),
                vision_config=dict(PICTURE),
                projection_dim=16,
            )
        ),
        ["vision", "text"],
    ),
    "wav2vec2": (lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**WAVES)), [""]),
    "hubert": (lambda: hf.HubertModel(hf.HubertConfig(**WAVES)), [""]),
    "bert": (lambda: hf.BertForQuestionAnswering(hf.BertConfig(vocab_size=101, **BASE)), [""]),
    "bert-pretraining": (
        lambda: hf.BertForPreTraining(hf.BertConfig(vocab_size=101, **BASE)),
        [""],
    ),
    "layoutlm": (lambda: hf.LayoutLMModel(hf.LayoutLMConfig(vocab_size=101, **BASE)), [""]),
    "albert": (
        lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(vocab_size=101, **BASE, embedding_size=16)),
        [""],
    ),
    "classifier": (
        lambda: hf.LlamaForSequenceClassification(
            hf.LlamaConfig(vocab_size=101, **GQA, pad_token_id=None)
        ),
        [""],
    ),
    "encoder-decoder": (
        lambda: hf.EncoderDecoderModel(
            encoder=hf.BertModel(hf.BertConfig(vocab_size=101, **BASE)),
            decoder=hf.BertLMHeadModel(
                hf.BertConfig(vocab_size=101, **BASE, is_decoder=True, add_cross_attention=True)
            ),
        ),
        ["encoder", ""],
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_objects_load_with_a_sample_made_for_them(name: str) -> None:
    make, towers = KINDS[name]
    torch.manual_seed(0)
    module = make().eval()
    model = interp.load(module)
    assert sorted(model.towers) == sorted(towers)
    inputs = model._adapter._sample
    plain = logits_of(module(**inputs))
    seen: list[tuple[str, str, int]] = []

    def note(stats: Any) -> None:
        seen.append((stats.site.tower, stats.site.kind, stats.site.layer))

    from interp_hooks import Question

    with model.watch(Question(frozenset({"entropy"})), note):
        tapped = logits_of(model(**inputs))
    torch.testing.assert_close(tapped, plain, rtol=1e-3, atol=1e-4)
    assert seen == [(s.tower, s.kind, s.layer) for s in model.sites]
    with model.edit(Ablate(model.heads)):
        assert float((logits_of(model(**inputs)) - plain).abs().max()) > 1e-6


def test_layers_and_heads_of_an_encoder_and_a_decoder_may_differ() -> None:
    model = interp.load(KINDS["bart"][0]().eval())
    sizes = {(s.tower, s.kind): [] for s in model.sites}
    for site in model.sites:
        sizes[site.tower, site.kind].append((site.layer, site.n_heads))
    assert sizes == {
        ("encoder", "self"): [(0, 2), (1, 2), (2, 2)],
        ("", "self"): [(0, 4), (1, 4)],
        ("", "cross"): [(0, 4), (1, 4)],
    }


@torch.no_grad()
def test_layers_that_share_a_module_are_edited_one_by_one() -> None:
    torch.manual_seed(0)
    module = KINDS["albert"][0]().eval()
    model = interp.load(module)
    assert [s.layer for s in model.sites] == [0, 1]
    ids = torch.arange(9)[None] + 5
    projection = module.albert.encoder.albert_layer_groups[0].albert_layers[0].attention.dense
    for layer in (0, 1):
        calls = []

        def silence(_: Any, args: tuple, layer: int = layer, calls: list = calls) -> tuple | None:
            calls.append(1)
            if len(calls) - 1 != layer:
                return None
            z = args[0].clone()
            z[..., :8] = 0  # the first head
            return (z,)

        handle = projection.register_forward_pre_hook(silence)
        wanted = module(ids).logits
        handle.remove()
        with model.edit(Ablate([(layer, 0)])):
            given = model(input_ids=ids).logits
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bart", "vit", "bert", "t5"])
def test_a_folder_loads_as_the_class_that_saved_it(tmp_path: Path, name: str) -> None:
    module = KINDS[name][0]()
    module.save_pretrained(tmp_path)
    assert type(interp.load(tmp_path, device="cpu").module) is type(module)


def test_the_class_of_a_config() -> None:
    bert = hf.BertConfig(architectures=["BertForTokenClassification"])
    assert class_of(bert) is hf.BertForTokenClassification
    assert class_of(hf.BertConfig(architectures=["BertModel"])) is hf.BertModel
    assert class_of(hf.BertConfig(architectures=["NoSuchClass"])) is hf.AutoModelForCausalLM
    assert class_of(hf.T5Config(architectures=None)) is hf.AutoModelForSeq2SeqLM
    assert class_of(hf.GPT2Config(architectures=["GPT2Model"])) is hf.AutoModelForCausalLM
    assert class_of(hf.ViTConfig(architectures=None)) is hf.AutoModel


def test_what_a_models_own_code_raises_is_one_sentence() -> None:
    class Broken(hf.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **more: Any) -> Any:
            raise KeyError("its own trouble")

    with pytest.raises(TapError, match=r"sample=.*KeyError.*its own trouble"):
        interp.load(Broken(hf.LlamaConfig(vocab_size=101, **GQA)))


def test_a_sample_of_ones_own() -> None:
    module = KINDS["vit"][0]().eval()
    model = interp.load(module, sample=dict(pixel_values=torch.randn(1, 3, 16, 16)))
    assert len(model.sites) == 2


def test_what_reads_no_text_is_not_scanned_and_says_what_to_do() -> None:
    for name, words in (
        ("whisper", "reads sound.*cross_agreement"),
        ("dit", "draws pictures.*hunt"),
    ):
        with pytest.raises(InputError, match=words):
            interp.plan_scan(name)
