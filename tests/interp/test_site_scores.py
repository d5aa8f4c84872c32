"""Scores that only some architectures have, against eager attention and the gate's own formula in
float64: learned sinks (gpt-oss) and output gates (Qwen3-Next)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as hf

import interp
from interp.inputs.text import rows_of_text
from interp_hooks import HookedModel, hook

CONTEXT, SAMPLES, SEED = 64, 3, 2
Build = Callable[[str], tuple[HookedModel, Any]]


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[torch.Tensor]:
    texts = rows_of_text(tokenizer, None, CONTEXT, SAMPLES, SEED)
    return [torch.tensor([row]) for row in texts]


def qwen3_next(vocabulary: int) -> Any:
    torch.manual_seed(0)
    config = hf.Qwen3NextConfig(
        vocab_size=vocabulary,
        **tiny.GQA,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    tiny.stir(model)
    return model


def gpt_oss(vocabulary: int, off: float = 0.0) -> Any:
    """With the sink logit of layer 0's head 1 raised by `off`, the head is nearly off."""
    model = tiny.build("gpt_oss", vocabulary)
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks[1] += off
    return model


def in_doubles(module: Any) -> Any:
    """Eager in float64; its experts too, whose grouped products know no float64."""
    plain = tiny.eager(module)
    plain.set_experts_implementation("eager")
    return plain.double()


def scanned(model: HookedModel, scores: Any) -> interp.Atlas:
    return interp.scan_heads(
        model, scores, context=CONTEXT, samples=SAMPLES, seed=SEED, progress=False
    )


@pytest.mark.parametrize("off", [0.0, 8.0])
def test_off_mass_and_key_entropy_are_those_of_eager_attention(
    tokenizer: Any, rows: list[torch.Tensor], off: float
) -> None:
    module = gpt_oss(len(tokenizer), off)
    atlas = scanned(hook(module, tokenizer=tokenizer), ["off_mass", "key_entropy", "entropy"])
    plain = in_doubles(module)  # eager attention gives A without the sink's column
    missing, spread, plain_spread = [], [], []
    for row in rows:
        weights, _ = tiny.attentions(plain, input_ids=row)
        a = torch.stack([w[0] for w in weights])  # (layers, heads, queries, keys)
        mass = a.sum(-1, keepdim=True)
        missing.append((1 - mass[..., 0]).mean(-1))
        spread.append(torch.special.entr(a / mass).sum(-1).mean(-1))
        plain_spread.append(torch.special.entr(a).sum(-1).mean(-1))
    for name, wanted, atol in (
        ("off_mass", missing, 2e-6),
        ("key_entropy", spread, 1e-4),
        ("entropy", plain_spread, 1e-5),
    ):
        mean = torch.stack(wanted).mean(0).numpy()
        np.testing.assert_allclose(atlas[name], mean, atol=atol, rtol=1e-5, err_msg=name)
    if off:  # what misled: little entropy, no sink, and yet spread out where it attends at all
        assert atlas.value("L0H1", "off_mass") > 0.9
        assert atlas.value("L0H1", "entropy") < 0.2 * atlas.value("L0H1", "key_entropy")


def test_gate_open_is_the_mean_of_the_gate(tokenizer: Any, rows: list[torch.Tensor]) -> None:
    module = qwen3_next(len(tokenizer))
    atlas = scanned(hook(module, tokenizer=tokenizer), ["gate_open"])
    attention = module.model.layers[1].self_attn
    given: list[torch.Tensor] = []
    handle = attention.register_forward_pre_hook(
        lambda m, args, kw: given.append(kw["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        for row in rows:
            module(input_ids=row, use_cache=False)
    handle.remove()
    weight = attention.q_proj.weight.double().unflatten(0, (4, 2, 8))[:, 1]  # (heads, d, d_model)
    gates = [torch.einsum("btm,hdm->bthd", x.double(), weight).sigmoid() for x in given]
    wanted = torch.stack([g.mean((0, 1, 3)) for g in gates]).mean(0)
    np.testing.assert_allclose(atlas["gate_open"][1], wanted.detach().numpy(), atol=1e-6)
    assert np.ma.getmaskarray(atlas["gate_open"])[0].all()  # a layer of linear attention


@pytest.mark.parametrize(
    "name, own", [("gpt_oss", {"off_mass", "key_entropy"}), ("qwen3_next", {"gate_open"})]
)
def test_default_scans_have_them_where_the_model_has(
    tokenizer: Any, name: str, own: set[str]
) -> None:
    build = gpt_oss if name == "gpt_oss" else qwen3_next
    model = hook(build(len(tokenizer)), tokenizer=tokenizer)
    for which in ("default", "all"):
        plan = interp.plan_scan(model, which, context=CONTEXT, samples=1)
        names = {score.name for score in plan.scores}
        assert names & {"off_mass", "key_entropy", "gate_open"} == own


def test_other_models_say_that_they_are_not_defined(tokenizer: Any) -> None:
    model = hook(tiny.build("llama", len(tokenizer)), tokenizer=tokenizer)
    plan = interp.plan_scan(model, "default", context=CONTEXT, samples=1)
    assert not {"off_mass", "key_entropy", "gate_open"} & {score.name for score in plan.scores}
    atlas = scanned(model, ["off_mass", "gate_open", "sink"])
    for name in ("off_mass", "gate_open"):
        assert np.ma.getmaskarray(atlas[name]).all()
    assert any("off_mass: not measured, for the softmax" in note for note in atlas.notes)
    assert any("gate_open: not measured" in note for note in atlas.notes)


def test_key_mass_goes_with_groups_of_keys(tokenizer: Any) -> None:
    """Labels of one's own stay as they are, and keys of no group count in the mass all the same."""
    module = tiny.build("gpt_oss", 101)
    model, ids = hook(module), torch.arange(3, 23)[None]
    labels = torch.arange(20)[None] % 3 - 1  # −1, 0, 1
    with torch.no_grad(), model.observe("key_mass", "group_mass", labels=labels) as seen:
        model(input_ids=ids)
    weights, _ = tiny.attentions(in_doubles(module), input_ids=ids)
    torch.testing.assert_close(seen[0].key_mass.double(), weights[0].sum(-1), atol=1e-6, rtol=0)
    for group in (0, 1):
        wanted = (weights[0] * (labels == group)[:, None, None]).sum(-1)
        got = seen[0].group_mass[..., group].double()
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    assert seen[0].group_mass.shape[-1] == 2
