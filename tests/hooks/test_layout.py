"""A model class that this toolkit has never seen, its modules named by a `Layout`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import interp
from interp_hooks import HookedModel, hook
from interp_hooks.errors import TapError
from interp_hooks.huggingface.layout import DEFAULT, TABLE, middle_norm, position_table

LAYOUT = interp.Layout(output_projection="wout", query="wq", key="wk", value="wv")
NORMS = interp.Layout(final_norm="last", middle_norm="mid")


class Attention(nn.Module):
    """Llama's attention under other names."""

    def __init__(self, old: LlamaAttention):
        super().__init__()
        self.wq, self.wk, self.wv, self.wout = old.q_proj, old.k_proj, old.v_proj, old.o_proj
        self.config, self.layer_idx, self.d = old.config, old.layer_idx, old.head_dim
        self.num_key_value_groups, self.scaling = old.num_key_value_groups, old.scaling
        self.is_causal = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.d)
        q, k, v = (
            w(hidden_states).view(shape).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        z, _ = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.wout(z.reshape(*hidden_states.shape[:-1], -1)), None


def renamed() -> hf.LlamaForCausalLM:
    """A tiny random Llama whose modules have names of their own."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    for block in model.model.layers:
        block.self_attn = Attention(block.self_attn)
    return model


@pytest.fixture(scope="module")
def named() -> HookedModel:
    return interp.load(renamed(), layout=LAYOUT)


def test_without_the_layout_head_weights_are_found_by_their_numbers(named: HookedModel) -> None:
    model = hook(renamed())
    mine, theirs = model.head_weights(1), named.head_weights(1)
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name))


@pytest.mark.parametrize("wrong", [dict(query="wk"), dict(key="wv"), dict(value="wk")])
def test_a_layout_that_the_numbers_contradict_is_refused(wrong: dict[str, str]) -> None:
    model = hook(renamed(), layout=interp.Layout(**{**vars(LAYOUT), **wrong}))
    with pytest.raises(TapError, match="Head weights of layer 1 are refused: what the layout"):
        model.head_weights(1)
    with pytest.raises(TapError, match="layout"), model.projections(lambda *_: None):
        pass


@torch.no_grad()
def test_heads_add_up_to_the_layer(named: HookedModel) -> None:
    ids = torch.arange(9)[None] % 60
    module = named.module.model.layers[1].self_attn
    seen = {}
    handle = module.register_forward_hook(lambda m, a, out: seen.update(out=out[0]))
    with named.capture_z() as z:
        named(input_ids=ids)
    handle.remove()
    weights = named.head_weights(1)
    torch.testing.assert_close(weights.result(z[1]).sum(2), seen["out"], atol=1e-5, rtol=1e-5)
    wq = module.wq.weight.reshape(4, 8, 32).transpose(1, 2)  # (heads, d_model, d_head)
    assert torch.equal(weights.W_Q, wq)
    assert torch.equal(
        weights.W_K, module.wk.weight.reshape(2, 8, 32).transpose(1, 2)[[0, 0, 1, 1]]
    )


@torch.no_grad()
def test_projections_are_seen_under_their_names(named: HookedModel) -> None:
    seen: dict[tuple[str, int], torch.Tensor] = {}
    with named.projections(lambda place, layer, t: seen.update({(place, layer): t})):  # type: ignore[func-returns-value]
        named(input_ids=torch.arange(5)[None])
    assert {k: tuple(v.shape) for k, v in seen.items()} == {
        (place, layer): (1, 5, heads, 8)
        for layer in (0, 1)
        for place, heads in (("q", 4), ("k", 2), ("v", 2))
    }


def test_names_of_the_user_come_first() -> None:
    for field in TABLE:
        assert interp.Layout(**{field: "mine"}).names(field) == ("mine", *TABLE[field])
        assert interp.Layout(**{field: ("one", "two")}).names(field)[:2] == ("one", "two")
    assert DEFAULT.names("fused") == TABLE["fused"]
    with pytest.raises(TypeError, match="output_projection of a layout"):
        interp.Layout(output_projection=[3])  # type: ignore[arg-type]


def test_norms_and_positions_by_their_names() -> None:
    block = nn.ModuleDict({"mid": nn.LayerNorm(4), "post_attention_layernorm": nn.LayerNorm(4)})
    assert middle_norm(block, NORMS) is block["mid"]
    assert middle_norm(block, DEFAULT) is block["post_attention_layernorm"]
    places = nn.ModuleDict({"where": nn.Embedding(5, 2)})
    assert position_table(places, DEFAULT) is None
    assert position_table(places, interp.Layout(positions="where")) == "where"


def test_a_name_that_no_module_has_is_refused() -> None:
    with pytest.raises(TapError, match=r"final_norm='nrm', and no module .* did you mean norm"):
        interp.load(renamed(), layout=interp.Layout(final_norm="nrm"))
    with pytest.raises(TapError, match="vision='eyes'"):
        interp.load(renamed(), layout=interp.Layout(vision="eyes"))


def test_a_projection_of_the_wrong_size_is_refused_by_name() -> None:
    """Head weights alone: the tap itself stands."""
    model = interp.load(renamed(), layout=interp.Layout(output_projection="wq"))
    with pytest.raises(TapError, match="Head weights of layer 0 are refused"):
        model.head_weights(0)
