"""Padded rows of models with learned positions answer as the same text alone; contexts of scaled
rotary positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tiny import build, stir

from interp_hooks import HookedModel, hook
from interp_hooks.huggingface.context import max_context

IDS = torch.tensor([[5, 17, 3, 99, 42, 8]])
PADDED = torch.nn.functional.pad(IDS, (3, 0))
MASK = (PADDED != 0).long()
SIZES: dict[str, Any] = dict(vocab_size=101, pad_token_id=0, bos_token_id=1, eos_token_id=2)
CAUSAL: dict[str, Any] = {
    "biogpt": lambda: hf.BioGptConfig(
        **SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    ),
    "ctrl": lambda: hf.CTRLConfig(**SIZES, n_embd=32, n_layer=2, n_head=4, dff=48),
    "bart": lambda: hf.BartConfig(
        **SIZES, d_model=32, encoder_layers=2, decoder_layers=2, decoder_attention_heads=4,
        decoder_ffn_dim=48,
    ),
    "roberta": lambda: hf.RobertaConfig(
        **SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        is_decoder=True,
    ),
}  # fmt: skip


def loaded(name: str) -> HookedModel:
    if name in ("gpt2", "opt", "llama"):
        return hook(build(name))
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CAUSAL[name]()).eval()
    stir(model)
    return hook(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", *CAUSAL])
def test_a_padded_row_is_the_text_alone(name: str) -> None:
    model = loaded(name)
    alone = model.module(input_ids=IDS).logits
    torch.testing.assert_close(model.logits(PADDED, MASK)[:, 3:], alone, rtol=1e-4, atol=1e-4)
    with model.capture_z() as z:
        model(input_ids=PADDED, attention_mask=MASK)
    with model.capture_z() as own:
        model(input_ids=IDS)
    torch.testing.assert_close(z[1][:, 3:], own[1], rtol=1e-4, atol=1e-4)
    first = model(input_ids=PADDED[:, :-2], attention_mask=MASK[:, :-2], use_cache=True)
    second = model(
        input_ids=PADDED[:, -2:], attention_mask=MASK, past_key_values=first.past_key_values,
        use_cache=True,
    )  # fmt: skip
    torch.testing.assert_close(second.logits, alone[:, -2:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positions_that_the_caller_gives_stand() -> None:
    model = loaded("gpt2")
    places = torch.arange(9)[None]
    given = model.logits(PADDED, MASK, position_ids=places)
    assert torch.equal(given, model.module(PADDED, attention_mask=MASK, position_ids=places).logits)
    assert not torch.allclose(given[:, 3:], model.logits(PADDED, MASK)[:, 3:], atol=1e-3)


def test_a_model_with_numbers_of_its_own_takes_none_from_zero() -> None:
    """RoBERTa's positions begin after the padding index: 0, 1, 2 are other rows of its table."""
    assert "position_ids" not in loaded("roberta").accepts
    assert "position_ids" in loaded("gpt2").accepts


ROPE = dict(rope_theta=1e4)
CONTEXTS: list[tuple[int, dict[str, Any], int]] = [
    (4096, dict(rope_type="default"), 4096),
    (32768, dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
    (131072, dict(rope_type="yarn", factor=32.0, original_max_position_embeddings=4096), 131072),
    (2048, dict(rope_type="linear", factor=4.0), 8192),
    (2048, dict(rope_type="dynamic", factor=2.0), 4096),
    (
        131072,
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=8192),
        131072,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("limit", "rope", "wanted"), CONTEXTS)
def test_the_context_of_scaled_positions(limit: int, rope: dict[str, Any], wanted: int) -> None:
    config = hf.LlamaConfig(max_position_embeddings=limit, rope_parameters={**ROPE, **rope})
    assert max_context(config) == wanted


def test_contexts_that_are_not_scaled() -> None:
    assert max_context(hf.GPT2Config()) == 1024
    assert max_context(hf.Gemma3TextConfig()) == 131072
    assert max_context(hf.BloomConfig()) is None
