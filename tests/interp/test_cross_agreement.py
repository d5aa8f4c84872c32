"""Cross-attention against attribution: eager attentions, autograd on the plain model, and sound
whose notes lie at known times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp import scenes
from interp.errors import InputError
from interp.mechanics import cross_agreement
from interp.mechanics.crossing import Crossing
from interp.mechanics.saliency import SALIENCIES
from interp.results.head_table import KEYS
from interp_hooks import HookedModel, hook

SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
SIZES = dict(
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    d_model=32,
    init_std=0.3,
)
TOLD = [[5, 9, 4], [7, 30, 8, 3]]


def whisper() -> Any:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=41,
            num_mel_bins=6,
            max_source_positions=10,
            max_target_positions=12,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **SIZES,
            **SPECIAL,
        )
    )


def bart() -> Any:
    return hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=101, max_position_embeddings=64, **SIZES, **SPECIAL)
    )


def t5() -> Any:
    special = {**SPECIAL, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=101,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            initializer_factor=3.0,
            **special,
        )
    )


def pair(kind: str) -> tuple[HookedModel, Any, list[dict[str, torch.Tensor]]]:
    """(tapped, eager twin, two samples)."""
    torch.manual_seed(0)
    module = dict(whisper=whisper, bart=bart, t5=t5)[kind]().eval()
    tiny.stir(module)
    if kind == "whisper":
        samples = [dict(input_features=torch.randn(1, 6, 20)) for _ in range(2)]
    else:
        samples = [dict(input_ids=torch.arange(3, n)[None] * 7 % 101) for n in (12, 15)]
    return hook(module), tiny.eager(module), samples


def eager(plain: Any, sample: dict[str, torch.Tensor], told: list[int], of: str) -> Any:
    """(cross-attentions by layer, |gradient × input| (told, positions)) of the untouched model."""
    ids = torch.tensor([[plain.config.decoder_start_token_id, *told[:-1]]])
    if of == "encoder":
        leaf = plain.get_encoder()(**sample)[0].detach().requires_grad_()
        given_: dict[str, Any] = dict(encoder_outputs=(leaf,))
    elif "input_features" in sample:
        leaf = sample["input_features"].clone().requires_grad_()
        given_ = dict(input_features=leaf)
    else:
        leaf = plain.get_input_embeddings()(sample["input_ids"]).detach().requires_grad_()
        given_ = dict(inputs_embeds=leaf)
    out = plain(**given_, decoder_input_ids=ids, output_attentions=True, use_cache=False)
    maps = []
    for t, token in enumerate(told):
        metric = out.logits[0, t, token] - out.logits[0, t].mean()
        slope = torch.autograd.grad(metric, leaf, retain_graph=True)[0]
        product = (leaf * slope)[0].detach()
        maps.append(product.sum(int(of == "encoder" or "input_ids" in sample)))
    sizes = torch.stack(maps).abs().double().numpy()
    return [a[0].detach().double().numpy() for a in out.cross_attentions], sizes


@pytest.mark.parametrize("of", ["input", "encoder"])
@pytest.mark.parametrize("kind", ["whisper", "bart", "t5"])
def test_agreement_is_its_definition(kind: str, of: str) -> None:
    model, plain, samples = pair(kind)
    frame = cross_agreement(model, samples, TOLD, of=of, methods=["gradient"])
    pearson, spearman, everything = [], [], []
    for sample, told in zip(samples, TOLD, strict=True):
        attentions, sizes = eager(plain, sample, told, of)
        keys = attentions[0].shape[-1]
        pooled = sizes.reshape(len(told), keys, -1).sum(-1)
        wanted = (pooled / pooled.sum(-1, keepdims=True)).ravel()
        heads = [a[h].ravel() for a in attentions for h in range(4)]
        pearson.append([np.corrcoef(a, wanted)[0, 1] for a in heads])
        spearman.append([scipy.stats.spearmanr(a, wanted).statistic for a in heads])
        everything.append(np.corrcoef(np.mean(heads, 0), wanted)[0, 1])
    np.testing.assert_allclose(frame["pearson_gradient"], np.mean(pearson, 0), atol=2e-3)
    np.testing.assert_allclose(frame["spearman_gradient"], np.mean(spearman, 0), atol=2e-2)
    assert frame.attrs["all"]["pearson_gradient"]["mean"] == pytest.approx(
        np.mean(everything), abs=2e-3
    )
    assert list(frame.columns[:5]) == list(KEYS) and set(frame.kind) == {"cross"}
    assert len(frame) == 8 and [row["layer"] for row in frame.attrs["layers"]] == [0, 1]


@pytest.mark.parametrize("kind", ["whisper", "bart", "t5"])
def test_all_methods_know_encoder_decoders(kind: str) -> None:
    """DeepLIFT's parts add up to the change (T5's logits are so far apart that float32 loses some),
    and no method is refused."""
    model, plain, samples = pair(kind)
    sample = {k: v.double() if v.is_floating_point() else v for k, v in samples[0].items()}
    exact = Crossing(hook(plain.double()), sample, tuple(TOLD[0])).entered("input", "mean")
    own, other = exact.outputs(torch.stack([exact.still()[0], -exact.difference]))
    found = SALIENCIES["deeplift"](exact, 1).sum(-1)
    torch.testing.assert_close(found, own - other, rtol=1e-3, atol=1e-3)
    frame = cross_agreement(model, samples[:1], TOLD[:1], steps=4)
    assert frame.attrs["notes"] == []
    assert {f"pearson_{m}" for m in SALIENCIES} <= set(frame.columns)


def test_spans_are_shares_of_attention_and_a_shuffled_twin_stands_beside() -> None:
    model, plain, samples = pair("whisper")
    spans = [[(0, 3), None, (4, 10)], [(2, 3), (0, 10), (9, 10), None]]
    frame = cross_agreement(model, samples, TOLD, methods=["gradient"], spans=spans)
    shares = []
    for sample, told, own in zip(samples, TOLD, spans, strict=True):
        attentions, _ = eager(plain, sample, told, "input")
        for t, span in enumerate(own):
            if span is not None:
                rows = np.concatenate([a[:, t] for a in attentions])  # (heads, keys)
                shares.append(rows[:, slice(*span)].sum(-1))
    np.testing.assert_allclose(frame["on_span"], np.mean(shares, 0), atol=1e-5)
    lengths = [3, 6, 1, 10, 1]
    assert frame.attrs["span"]["even"] == pytest.approx(np.mean(lengths) / 10)
    assert frame.attrs["shuffled"]["pearson_gradient"]["n"] == 2
    assert (
        frame.attrs["shuffled"]["pearson_gradient"]["mean"]
        != frame.attrs["all"]["pearson_gradient"]["mean"]
    )
    alone = cross_agreement(model, samples[:1], TOLD[:1], methods=["gradient"])
    assert alone.attrs["shuffled"]["pearson_gradient"] is None


def test_what_does_not_fit_is_refused_in_a_sentence(worded: Any) -> None:
    model, _, samples = pair("whisper")
    for call, words in [
        (lambda: cross_agreement(worded("llama")[0], ["a"]), "no cross-attention"),
        (lambda: cross_agreement(model, samples, TOLD[:1]), "2 samples and 1 targets"),
        (lambda: cross_agreement(model, samples, TOLD, methods=["shap"]), "not \\['shap'\\]"),
        (lambda: cross_agreement(model, samples, TOLD, methods=[]), "not none"),
        (lambda: cross_agreement(model, samples, TOLD, of="middle"), "input or encoder"),
        (lambda: cross_agreement(model, samples, TOLD, spans=[[None]]), "spans of 1"),
        (lambda: cross_agreement(model, samples, TOLD, spans=[[None]] * 2), "give None"),
        (lambda: cross_agreement(model, [3.0]), "not float"),
        (lambda: cross_agreement(model, [dict(pixels=torch.zeros(1))]), "input_features"),
        (lambda: cross_agreement(model, ["la"]), "without a tokenizer"),
        (lambda: cross_agreement(model, samples, [[], [3]]), "Nothing is told"),
        (
            lambda: cross_agreement(model, [dict(input_features=torch.zeros(2, 6, 20))], TOLD[:1]),
            "list of samples",
        ),
        (
            lambda: cross_agreement(
                model, samples, TOLD, methods=["gradient"], spans=[[None] * 3, [None] * 4]
            ),
            "No told token",
        ),
        (
            lambda: cross_agreement(
                model, samples[:1], TOLD[:1], methods=["gradient"], spans=[[(0, 3), (9, 11), None]]
            ),
            "positions 0 to 9",
        ),
    ]:
        with pytest.raises(InputError, match=words):
            call()


def heard(model: HookedModel, melodies: list[scenes.Melody]) -> list[Any]:
    return [
        model.processor(scenes.waveform(m), sampling_rate=scenes.RATE, return_tensors="pt")
        for m in melodies
    ]


def test_pocket_whisper_looks_where_the_notes_are() -> None:
    """It writes melodies down that it never heard, every cross head rests on the note that is told,
    and attribution agrees with its own sample alone."""
    model = interp.load("whisper")
    melodies = [scenes.melody(10_000_000 + i) for i in range(6)]
    spans = [
        [(int(n.start * 50), int(np.ceil(n.end * 50))) for n in m.notes]  # 50 positions a second
        for m in melodies
    ]
    frame = cross_agreement(
        model, heard(model, melodies), spans=spans, methods=["gradient", "lrp"], of="encoder"
    )
    told = [model.tokenizer.decode(t) for t in frame.attrs["told"]]
    assert told == [m.text for m in melodies]
    even = frame.attrs["span"]["even"]
    assert frame["on_span"].min() > 0.5 > 5 * even
    assert frame.attrs["span"]["lrp"] > 0.8
    for name in ("pearson_gradient", "pearson_lrp"):
        own, other = frame.attrs["all"][name], frame.attrs["shuffled"][name]
        assert own["low"] > other["high"] and own["mean"] > 0.6


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**9))
def test_melodies_are_what_they_say(seed: int) -> None:
    """Sounds in order, none over another, inside 3 seconds; a note's strongest frequency is its
    own, and silence is hiss."""
    melody = scenes.melody(seed)
    wave = scenes.waveform(melody)
    assert wave.shape == (48_000,) and np.isfinite(wave).all() and len(melody.notes) >= 1
    ends = [0.0]
    for sound in melody.sounds:
        assert ends[-1] < sound.start < sound.end <= 3
        ends.append(sound.end)
        part = wave[int(sound.start * 16_000) : int(sound.end * 16_000)]
        if sound.name is None:
            continue
        spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), 65_536))
        peak = float(spectrum.argmax() * 16_000 / 65_536)
        assert abs(peak - scenes.NOTES[sound.name]) < 12
    silence = wave[int(ends[-1] * 16_000) + 1 :]
    assert len(silence) < 100 or silence.std() < 0.02
