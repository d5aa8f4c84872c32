"""Cross-attention: query rows are the decoder's, keys the encoder's, whatever is padded."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from prompts import tokens

from interp_hooks import HookedModel, hook
from interp_kernels import Received

SIZES = dict(
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
BARTS = dict(vocab_size=101, d_model=32, init_std=0.3, max_position_embeddings=64, **SIZES)
MODELS = {
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BARTS, **SPECIAL)),
    "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**BARTS, **SPECIAL)),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**BARTS, **SPECIAL)),
    "pegasus": lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**BARTS, **SPECIAL)),
    "blenderbot": lambda: hf.BlenderbotForConditionalGeneration(
        hf.BlenderbotConfig(**BARTS, **SPECIAL)
    ),
    "m2m_100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**BARTS, **SPECIAL)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=101,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            initializer_factor=3.0,
            **{**SPECIAL, "decoder_start_token_id": 0},
        )
    ),
}
ENCODER, DECODER = 10, 6


def pair(name: str) -> tuple[HookedModel, Any]:
    """(tapped, eager twin)."""
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    tiny.stir(module)
    sample = dict(
        input_ids=tokens(5, length=7),
        attention_mask=torch.tensor([[1] * 7, [0, 0] + [1] * 5]),
        decoder_input_ids=tokens(6, length=4),
    )
    return hook(module, sample=sample), tiny.eager(module)


def padded_inputs(decoder_padding: bool) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, ENCODER, dtype=torch.long)
    mask[1, :4] = 0
    given = dict(
        input_ids=tokens(length=ENCODER),
        attention_mask=mask,
        decoder_input_ids=tokens(2, length=DECODER),
    )
    if decoder_padding:
        given["decoder_attention_mask"] = torch.ones(2, DECODER, dtype=torch.long)
        given["decoder_attention_mask"][0, :2] = 0
    return given


@pytest.mark.parametrize("decoder_padding", [False, True], ids=["decoder-full", "decoder-padded"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_statistics_are_those_of_eager_attention(name: str, decoder_padding: bool) -> None:
    model, plain = pair(name)
    given = padded_inputs(decoder_padding)
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(-1, 3, (2, ENCODER), generator=draw)
    pairs = torch.randint(0, ENCODER, (2, DECODER, 1), generator=draw)
    chosen = torch.rand(2, DECODER, generator=draw) < 0.6
    with model.observe(
        "entropy",
        "max",
        "argmax",
        "group_mass",
        "pair_mass",
        labels=labels,
        pairs={"p": pairs},
        received={"all": Received(), "some": Received(chosen)},
    ) as seen:
        model(**given)
    wanted = plain(**given, output_attentions=True, use_cache=False)
    rows = given.get("decoder_attention_mask", torch.ones(2, DECODER)).bool()
    for layer, a in enumerate(a.double() for a in wanted.cross_attentions):
        found = seen["cross", layer]
        assert torch.equal(found.queries, rows)
        real = rows[:, None].expand(a.shape[:3])
        for name_, value in {
            "entropy": torch.special.entr(a).sum(-1),
            "max": a.amax(-1),
            "argmax": a.argmax(-1).double(),
        }.items():
            torch.testing.assert_close(
                found[name_].double()[real], value[real], atol=2e-4, rtol=1e-3
            )
            assert not found[name_][~real].clamp_min(0).any()
        masses = torch.stack([(a * (labels == g)[:, None, None]).sum(-1) for g in range(3)], -1)
        torch.testing.assert_close(
            found.group_mass.double()[real], masses[real], atol=2e-4, rtol=1e-3
        )
        own = a.gather(-1, pairs[:, None].expand(-1, 4, -1, -1))[..., 0]
        torch.testing.assert_close(
            found.pair_mass["p"].double()[real], own[real], atol=2e-4, rtol=1e-3
        )
        keys = given["attention_mask"].bool()[:, None, None]
        for key, queries in (("all", rows), ("some", rows & chosen)):
            weight = queries[:, None, :, None] & keys
            mean = (a * weight).sum(2) / weight.sum(2).clamp_min(1)
            torch.testing.assert_close(found.received_by(key).double(), mean, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["bart", "marian", "t5"])
@torch.no_grad()
def test_cached_steps_and_generate_see_the_rows_of_one_forward(name: str) -> None:
    """Rows recorded step by step, by hand and by `generate`, with sets of queries in the decoder's
    slots."""
    model, plain = pair(name)
    given = padded_inputs(False)
    start = torch.full((2, 1), plain.config.decoder_start_token_id)
    text = {k: given[k] for k in ("input_ids", "attention_mask")}
    chosen = torch.zeros(2, DECODER, dtype=torch.bool)
    chosen[:, 3:5] = True
    ask: Any = dict(received={"some": Received(chosen)})
    with model.observe("entropy", **ask) as generated:
        out = model.generate(
            **text,
            decoder_input_ids=start,
            max_new_tokens=DECODER,
            min_new_tokens=DECODER,
            do_sample=False,
        )
    ids = out[:, :DECODER]
    with model.observe("entropy", **ask) as stepwise:
        step = model(**text, decoder_input_ids=ids[:, :2])
        for i in range(2, DECODER):
            step = model(
                attention_mask=text["attention_mask"],
                decoder_input_ids=ids[:, i : i + 1],
                past_key_values=step.past_key_values,
                encoder_outputs=(step.encoder_last_hidden_state,),
            )
    wanted = plain(**text, decoder_input_ids=ids, output_attentions=True).cross_attentions
    keys = text["attention_mask"].bool()[:, None]
    for seen in (generated, stepwise):
        for layer, a in enumerate(a.double() for a in wanted):
            found = seen["cross", layer]
            assert bool(found.queries.all()) and found.entropy.shape[-1] == DECODER
            torch.testing.assert_close(
                found.entropy.double(), torch.special.entr(a).sum(-1), atol=2e-4, rtol=1e-3
            )
            mean = a[:, :, 3:5].mean(2) * keys
            torch.testing.assert_close(
                found.received_by("some").double(), mean, atol=2e-4, rtol=1e-3
            )
