"""Head weights are the maps that the model applies, whatever order, module or adapter holds them:
x W + b is held against the queries, keys and values of an attention call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from tiny import build, stir
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import interp.edits as EDITS
from interp.probes.settings import Settings
from interp.scores.ov_copying import OVCopying
from interp_hooks import HookedModel, Question, hook
from interp_hooks.errors import TapError
from interp_hooks.huggingface.linear_map import linear_map
from interp_hooks.huggingface.split import Split, agree, find

SMALL = dict(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
WIDE = dict(SMALL, intermediate_size=48, max_position_embeddings=64)
IDS = torch.tensor([[5, 17, 3, 99, 42, 8, 61]])


def made(config: Any) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    stir(model)
    return model


@torch.no_grad()
def numbers(model: HookedModel, layer: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(tokens, d_model) that a layer's attention reads, and its call's q, k, v (heads, tokens, d),
    keys and values repeated for their query heads."""
    attention = model.module.get_submodule(model.sites[layer].path)
    read: dict[str, torch.Tensor] = {}

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        read["x"] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0]

    calls: list[Any] = []
    handle = attention.register_forward_pre_hook(note, with_kwargs=True)
    with model.watch(Question(call=True), lambda stats: calls.append(stats.call)):
        model(input_ids=IDS)
    handle.remove()
    call = calls[layer]
    repeat = call.site.n_heads // call.site.n_kv_heads
    kv = (t[0].repeat_interleave(repeat, 0) for t in (call.key, call.value))
    return read["x"], dict(zip("qkv", (call.query[0], *kv), strict=True))


def through(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(heads, tokens, d)"""
    out = torch.einsum("tm,hmd->htd", x.double(), weight.double())
    return out if bias is None else out + bias.double()[:, None]


def check(model: HookedModel, layer: int, turned: bool) -> None:
    """x W + b is v at every token, and q, k where they are not turned: at position 0."""
    x, heads = numbers(model, layer)
    w = model.head_weights(layer)
    rows = slice(0, 1) if turned else slice(None)
    for place, weight, bias in (
        ("q", w.W_Q, w.b_Q),
        ("k", w.W_K, w.b_K),
        ("v", w.W_V, w.b_V),
    ):
        if place in w.normed:
            continue
        at = slice(None) if place == "v" else rows
        got, wanted = through(x, weight, bias)[:, at], heads[place][:, at].double()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


LAYOUTS: dict[str, tuple[Callable[[], Any], bool]] = {
    # head by head: q, k, v of head 0, then of head 1
    "gpt_bigcode": (
        lambda: hf.GPTBigCodeConfig(
            vocab_size=101, n_embd=32, n_head=4, n_layer=2, n_positions=64, multi_query=False
        ),
        False,
    ),
    "gpt_bigcode, one key head": (
        lambda: hf.GPTBigCodeConfig(
            vocab_size=101, n_embd=32, n_head=4, n_layer=2, n_positions=64, multi_query=True
        ),
        False,
    ),
    "gpt_neox": (lambda: hf.GPTNeoXConfig(**WIDE), True),
    "persimmon": (lambda: hf.PersimmonConfig(**WIDE), True),
    "phi3": (lambda: hf.Phi3Config(**WIDE, num_key_value_heads=2, pad_token_id=0), True),
    "starcoder2": (lambda: hf.Starcoder2Config(**WIDE, num_key_value_heads=2), True),
    "gpt2": (lambda: hf.GPT2Config(vocab_size=101, n_embd=32, n_head=4, n_layer=2), False),
    # keys are multiplied after their projection
    "falcon_h1": (
        lambda: hf.FalconH1Config(
            **WIDE, num_key_value_heads=2, key_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4,
            mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=4,
        ),
        True,
    ),
    "bert": (lambda: hf.BertConfig(**WIDE), False),
    "electra": (lambda: hf.ElectraConfig(**WIDE, embedding_size=16), False),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "falcon_h1")) for n in LAYOUTS]
)
def test_weights_are_the_maps_of_the_call(name: str) -> None:
    config, turned = LAYOUTS[name]
    model = hook(made(config()))
    for layer in range(2):
        check(model, layer, turned)
        assert model.head_weights(layer).W_O.shape == (4, 8, 32)


def test_norms_of_queries_and_keys_are_named() -> None:
    weights = hook(build("qwen3")).head_weights(0)
    assert weights.normed == {"q", "k"}
    assert hook(build("llama")).head_weights(0).normed == frozenset()


class Scaled(nn.Module):
    """A projection, and a change of what it gives."""

    def __init__(self, own: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.own, self.change = own, change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(self.own(x))


def test_a_projection_that_scales_counts_with_its_scale() -> None:
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj = Scaled(attention.v_proj, lambda v: 2.5 * v + 1)
    hooked = hook(model)
    check(hooked, 1, True)
    own = attention.v_proj.own.weight.reshape(2, 8, 32).transpose(1, 2).repeat_interleave(2, 0)
    torch.testing.assert_close(hooked.head_weights(1).W_V, 2.5 * own)
    torch.testing.assert_close(hooked.head_weights(1).b_V, torch.ones(4, 8))


def test_what_is_no_matrix_is_refused_by_name_and_the_others_stand() -> None:
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj = Scaled(attention.v_proj, torch.tanh)
    hooked = hook(model)
    weights = hooked.head_weights(1)
    with pytest.raises(TapError, match="W_V of layer 1 is refused: what its Scaled does is not"):
        _ = weights.W_V
    with pytest.raises(TapError, match="W_V of layer 1"):
        _ = weights.b_V
    assert weights.W_Q.shape == weights.W_K.shape == (4, 32, 8)
    assert repr(weights) == (
        "HeadWeights(W_Q (4, 32, 8), W_K (4, 32, 8), W_V refused, W_O (4, 8, 32))"
    )
    assert hooked.head_weights(0).W_V.shape == (4, 32, 8)
    with pytest.raises(TapError, match="W_V of layer 1"):
        OVCopying().cost(hooked, Settings())  # before the scan begins


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt_bigcode", "latent"])
def test_head_weights_asked_for_inside_blocks_disturb_nobody(name: str) -> None:
    """And are the same as outside: edits and hooks of the blocks don't reach them."""
    if name == "latent":  # queries in another order: its map is found by runs of its own
        config: Any = hf.DeepseekV3Config(
            **WIDE, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
            n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=2,
        )  # fmt: skip
    else:
        config = LAYOUTS[name][0]()
    model = hook(made(config))
    outside = model.head_weights(1).W_Q
    if name == "latent":
        check_latent(model)
    seen: list[Any] = []
    with (
        model.watch(Question(), seen.append),
        model.edit(EDITS.Ablate(["L0H1"])),
    ):
        assert torch.equal(model.head_weights(1).W_Q, outside)
        assert not seen
        model(input_ids=IDS)
        assert len(seen) == 2
    if name != "latent":
        with model.projections(lambda place, layer, t: 0 * t):
            assert torch.equal(model.head_weights(1).W_Q, outside)


def check_latent(model: HookedModel) -> None:
    """DeepSeek's queries are a matrix; its keys and values pass a norm."""
    x, heads = numbers(model, 1)
    w = model.head_weights(1)
    torch.testing.assert_close(
        through(x, w.W_Q, w.b_Q)[:, 0], heads["q"][:, 0].double(), rtol=1e-4, atol=1e-5
    )
    for name in ("W_K", "W_V"):
        with pytest.raises(TapError, match=f"{name} of layer 1 is refused: .* no linear map"):
            getattr(w, name)


class Mixed(LlamaAttention):
    """Llama's attention whose values are mixed with those of the first layer."""

    first: ClassVar[dict[str, torch.Tensor]] = {}

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            w(hidden_states).view(shape).transpose(1, 2)
            for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if self.layer_idx == 0:
            self.first["v"] = v
        v = 0.5 * (v + self.first["v"])
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        z, _ = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(z.reshape(*hidden_states.shape[:-1], -1)), None


def test_values_that_depend_on_another_layer_are_refused() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Mixed
    hooked = hook(model)
    check(hooked, 0, True)  # with itself: the map is its own
    weights = hooked.head_weights(1)
    with pytest.raises(TapError, match="W_V of layer 1 is refused"):
        _ = weights.W_V
    assert weights.W_K.shape == (4, 32, 8)


def test_quantised_layers_are_what_they_compute() -> None:
    """A layer that holds its weight in 8 bits: its matrix is the one it computes with."""

    class Int8(nn.Module):
        def __init__(self, linear: nn.Linear):
            super().__init__()
            self.scale = float(linear.weight.detach().abs().max()) / 127
            self.weight = nn.Parameter(
                (linear.weight / self.scale).round().to(torch.int8), requires_grad=False
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight.to(x) * self.scale).T

    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = Int8(layer.self_attn.q_proj)
    hooked = hook(model)
    check(hooked, 0, True)
    q = model.model.layers[0].self_attn.q_proj
    wanted = (q.weight * q.scale).reshape(4, 8, 32).transpose(1, 2)
    torch.testing.assert_close(hooked.head_weights(0).W_Q, wanted)


@pytest.mark.parametrize(
    "split",
    [Split(1, 0), Split(1, 32), Split(4, 8), Split(2, 16), Split(4, 1, 3), Split(1, 64, 1, 2)],
)
def test_splits_are_found(split: Split) -> None:
    """The split that made the target, or one that cuts the same."""
    torch.manual_seed(0)
    outputs = torch.randn(5, 96)
    numbers = split.numbers(96, 4, 8)
    target = outputs[:, numbers]
    found = find(outputs, target, turned=False)
    assert found is not None and torch.equal(found.numbers(96, 4, 8), numbers)
    assert find(outputs, target + 1e-2, turned=False) is None


def test_turned_heads_agree_by_length_and_at_one_token() -> None:
    torch.manual_seed(0)
    made_ = torch.randn(3, 2, 4, dtype=torch.float64)
    angle = torch.arange(3.0, dtype=torch.float64)[:, None, None]
    a, b = made_[..., ::2], made_[..., 1::2]
    turned = torch.stack(
        [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1
    ).flatten(2)
    assert agree(made_, turned, turned=True) and not agree(made_, turned, turned=False)
    assert not agree(made_, turned * 1.1, turned=True)
    assert agree(made_, turned * (1 + angle), turned=True, scaled=True)
    assert not agree(made_.flip(1), turned, turned=True)


def test_a_map_that_is_not_linear_is_refused() -> None:
    like = torch.zeros(0, 6)
    linear = nn.Linear(6, 4)
    weight, bias = linear_map(nn.Sequential(linear), like)
    torch.testing.assert_close(weight, linear.weight.detach())
    torch.testing.assert_close(bias, linear.bias.detach())
    with pytest.raises(TapError, match="what its Sequential does is not linear"):
        linear_map(nn.Sequential(linear, nn.ReLU()), like)


def test_layers_may_be_watched_again() -> None:
    """What was proved on load stands after another block of `layer_outputs`."""
    model = hook(build("llama"))
    with model.layer_outputs() as outputs, torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    assert len(outputs) == 2
    seen: list[str] = []
    with model.projections(lambda place, layer, value: seen.append(place)), torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    assert sorted(seen) == ["k", "k", "q", "q", "v", "v"]
    assert not model.head_weights(0).refused
