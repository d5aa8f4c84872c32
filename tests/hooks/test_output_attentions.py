"""`output_attentions=True` and `output_hidden_states=True` inside blocks, against eager models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from prompts import LENGTH, inputs_for, left_padded, tokens

from interp.edits import Ablate, ScaleHeads, SoftplusReweight, Temperature
from interp_hooks import HookedModel, hook
from interp_hooks.errors import TapError

Tapped = Callable[[str], tuple[HookedModel, Any]]
ASK = dict(output_attentions=True, output_hidden_states=True)


def same(found: Any, wanted: Any, real: torch.Tensor | None = None) -> None:
    """Tuples of tensors (a tuple a step, under generate), compared at real rows."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, tuple):
            same(one, other, real)
            continue
        assert one.shape == other.shape and one.dtype == other.dtype
        if real is not None:
            rows = real[:, -one.shape[-2] :]
            rows = rows[:, None].expand(one.shape[:3]) if one.ndim == 4 else rows
            one, other = one[rows], other[rows]
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("padding", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "gpt_oss"])
@torch.no_grad()
def test_they_are_the_eager_ones(tapped: Tapped, name: str, padding: bool) -> None:
    model, plain = tapped(name)
    mask = left_padded(padding)
    given = inputs_for(model, tokens(), mask)
    wanted = plain(**given, **ASK)
    keep = torch.ones(4, 1)
    keep[2] = 0
    with tiny.rewriting_z(plain, 0, lambda z: z * keep):
        edited = plain(**given, **ASK)
    with model.observe("entropy"):
        found = model(**given, **ASK)
    same(found.attentions, wanted.attentions, mask.bool())
    same(found.hidden_states, wanted.hidden_states, mask.bool())
    with model.edit(ScaleHeads({"0.2": 0.0})):
        found = model(**given, **ASK)
        trunk = model.module.base_model(**given, **ASK)
    same(found.attentions, edited.attentions, mask.bool())
    same(found.hidden_states, edited.hidden_states, mask.bool())
    same(trunk.attentions, edited.attentions, mask.bool())


@torch.no_grad()
def test_edits_of_weights_show(tapped: Tapped) -> None:
    model, plain = tapped("llama")
    own = plain(input_ids=tokens(), output_attentions=True).attentions[0].double()
    with model.edit(Temperature({"0.1": 0.5})), model.observe("entropy", stage="after") as seen:
        found = model(input_ids=tokens(), output_attentions=True).attentions[0]
    sharper = own[:, 1].square() / own[:, 1].square().sum(-1, keepdim=True)
    torch.testing.assert_close(found[:, 1].double(), sharper, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found[:, 0].double(), own[:, 0], atol=1e-5, rtol=1e-4)
    entropy = torch.special.entr(found.double()).sum(-1)
    torch.testing.assert_close(seen[0].entropy.double(), entropy, atol=1e-4, rtol=1e-3)
    with model.edit(Ablate("0.3")):
        again = model(input_ids=tokens(), output_attentions=True).attentions[0]
    torch.testing.assert_close(again.double(), own, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_gradients_flow_through_them(tapped: Tapped) -> None:
    model, plain = tapped("llama")
    grads = []
    for one in (model, plain):
        with torch.enable_grad(), model.observe("max"):
            a = one(input_ids=tokens(), output_attentions=True).attentions[1]
            weight = (one.module if one is model else one).model.embed_tokens.weight
            grads.append(torch.autograd.grad(a[..., 0].sum(), weight)[0])
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_generate_returns_them(tapped: Tapped) -> None:
    model, plain = tapped("llama")
    how = dict(
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **ASK,
    )
    mask = left_padded(True)
    given = dict(input_ids=tokens(), attention_mask=mask)
    wanted = plain.generate(**given, **how)
    with model.edit(ScaleHeads({"0.2": 1.5})), model.edit(ScaleHeads({"0.2": 1 / 1.5})):
        found = model.generate(**given, **how)
    real = torch.nn.functional.pad(mask, (0, 4), value=1).bool()
    assert torch.equal(found.sequences, wanted.sequences)
    same(found.attentions[:1], wanted.attentions[:1], mask.bool())
    same(found.attentions[1:], wanted.attentions[1:])
    same(found.hidden_states[1:], wanted.hidden_states[1:])
    assert real.shape[1] == LENGTH + 4


@torch.no_grad()
def test_cross_attentions() -> None:
    torch.manual_seed(0)
    sizes = dict(encoder_layers=2, decoder_layers=2)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    config = hf.BartConfig(vocab_size=101, d_model=32, init_std=0.3, **sizes, **heads)
    module = hf.BartForConditionalGeneration(config).eval()
    plain, model = tiny.eager(module), hook(module)
    given = dict(input_ids=tokens(), decoder_input_ids=tokens(2, length=6))
    wanted = plain(**given, output_attentions=True)
    with model.observe("max"):
        found = model(**given, output_attentions=True)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        same(found[name], wanted[name])
    how = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    wanted = plain.generate(input_ids=tokens(), **how, **ASK)
    with model.observe("max"):
        found = model.generate(input_ids=tokens(), **how, **ASK)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        same(found[name], wanted[name])


@torch.no_grad()
def test_they_are_refused_where_an_edit_has_no_weights(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    with model.edit(SoftplusReweight()), pytest.raises(TapError, match="output_attentions"):
        model(input_ids=tokens(), output_attentions=True)
