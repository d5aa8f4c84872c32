"""ProphetNet: its n-gram streams are heads of their own beside the main stream's, and each is equal
to the module's own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import interp
from interp.edits import ScaleHeads
from interp.errors import TapError
from interp_hooks import Head, HookedModel

CONFIG = hf.ProphetNetConfig(
    vocab_size=99,
    hidden_size=32,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_encoder_attention_heads=4,
    num_decoder_attention_heads=4,
    ngram=2,
    num_buckets=8,
    relative_max_distance=16,
    max_position_embeddings=64,
    init_std=0.3,
)
ROWS, TOKENS, WORDS = 2, 9, 6


@pytest.fixture(scope="module")
def model() -> HookedModel:
    torch.manual_seed(0)
    return interp.load(hf.ProphetNetForConditionalGeneration(CONFIG).eval())


def given() -> dict[str, torch.Tensor]:
    ids = (torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) * 37 + 11) % 99
    words = (torch.arange(ROWS * WORDS).reshape(ROWS, WORDS) * 17 + 5) % 99
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return dict(input_ids=ids, attention_mask=mask, decoder_input_ids=words)


def entropy(a: torch.Tensor) -> torch.Tensor:
    a = a.double()
    return -(a * torch.where(a > 0, a, 1).log()).sum(-1)


def test_towers(model: HookedModel) -> None:
    assert model.towers == ["encoder", "", "ngram"] and model.main_tower == ""
    assert (model.n_layers, model.n_heads) == (2, 4)


@torch.no_grad()
def test_patterns_of_every_stream(model: HookedModel) -> None:
    own = model.module(**given(), output_attentions=True)
    with model.observe("entropy", "max") as seen:
        tapped = model(**given())
    torch.testing.assert_close(tapped.logits, own.logits, atol=1e-4, rtol=1e-4)
    for layer in range(2):
        # what it hands over of encoder and cross-attention are logits before the softmax
        pairs = [
            (("encoder", layer), own.encoder_attentions[layer].double().softmax(-1)),
            (("cross", layer), own.cross_attentions[layer][:, :, :WORDS].double().softmax(-1)),
            (layer, own.decoder_attentions[layer].double()),
            # (batch, n, heads, queries, keys): a row of the call for each stream
            (("ngram", layer), own.decoder_ngram_attentions[layer].double().flatten(0, 1)),
        ]
        for key, pattern in pairs:
            got = seen[key]
            heads = slice(0, pattern.shape[-2])
            real = torch.ones(pattern.shape[0], pattern.shape[-2], dtype=torch.bool)
            if key == ("encoder", layer):
                real = given()["attention_mask"].bool()
            real = real[:, None].expand(pattern.shape[:-1])
            mine, best = got.entropy[..., heads].double(), got.max[..., heads].double()
            torch.testing.assert_close(mine[real], entropy(pattern)[real], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(best[real], pattern.amax(-1)[real], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tower", ["", "ngram"])
@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_a_gain_reaches_its_stream(model: HookedModel, tower: str, factor: float) -> None:
    """The head's z times a factor, where W_O reads it: first the main stream's, then the
    others'."""
    reads: list[int] = []

    def scaled(_: Any, args: tuple) -> tuple:
        reads.append(len(reads))
        if reads[-1] != ["", "ngram"].index(tower):
            return args
        z = args[0].clone()
        z[..., 8:16] *= factor
        return (z,)

    plain = model.module(**given()).logits
    out = model.module.prophetnet.decoder.layers[0].self_attn.out_proj
    handle = out.register_forward_pre_hook(scaled)
    want = model.module(**given()).logits
    handle.remove()
    with model.edit(ScaleHeads({Head(0, 1, tower): factor})):
        got = model(**given()).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (want - plain).abs().max() > 0.01 and reads == [0, 1]


@torch.no_grad()
def test_generated_tokens_are_its_own(model: HookedModel) -> None:
    inputs = {k: v for k, v in given().items() if not k.startswith("decoder")}
    how = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, num_beams=2)
    own = model.module.generate(**inputs, **how)
    with model.observe("entropy"):
        assert model.generate(**inputs, **how).equal(own)


def test_projections_are_refused_by_name(model: HookedModel) -> None:
    for tower in ("", "ngram"):
        with pytest.raises(TapError, match="not of the tokens that it reads"):
            _ = model.head_weights(0, tower).W_V


@pytest.mark.slow
def test_scans_are_of_the_main_stream() -> None:
    text = interp.load("llama").tokenizer
    config = hf.ProphetNetConfig(
        **{**CONFIG.to_dict(), "vocab_size": len(text), "max_position_embeddings": 128}
    )
    torch.manual_seed(0)
    decoder = interp.load(hf.ProphetNetForCausalLM(config).eval(), tokenizer=text)
    assert decoder.towers == ["", "ngram"]
    atlas = interp.scan_heads(
        decoder, "entropy,previous_token", context=64, samples=2, progress=False
    )
    assert atlas.towers == [""] and len(atlas.frame) == 8
    assert atlas.frame[["entropy", "previous_token"]].notna().all().all()
