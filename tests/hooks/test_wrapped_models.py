"""Models as people hold them: with adapters, offloaded, compiled, in training mode. Each answers as
the same weights held plainly, or is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_head_weights import IDS, check
from tiny import build
from torch import nn

import interp
from interp_hooks import hook
from interp_hooks.edit import LiveEdit
from interp_hooks.errors import TapError

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS),
    "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "modules_to_save": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["v_proj"]
    ),
}


@torch.no_grad()
def adapted(kind: str = "lora") -> Any:
    """A tiny Llama under a random adapter."""
    return disturbed(peft.get_peft_model(build("llama"), ADAPTERS[kind]()))


@torch.no_grad()
def disturbed(model: Any) -> Any:
    """With noise on every parameter of its adapters."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("lora", "ia3", "hada", "modules_to_save")):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_count_in_head_weights(kind: str) -> None:
    model = adapted(kind)
    hooked = hook(model)
    check(hooked, 0, True)
    check(hooked, 1, True)
    plain = build("llama").model.layers[0].self_attn.v_proj.weight
    own = plain.reshape(2, 8, 32).transpose(1, 2).repeat_interleave(2, 0)
    assert not torch.allclose(hooked.head_weights(0).W_V, own, atol=1e-2)


@torch.no_grad()
def test_the_output_projections_adapter_counts() -> None:
    """Against peft's own merging."""
    model = adapted()
    weights = hook(model).head_weights(1)
    merged = copy.deepcopy(model).merge_and_unload().model.layers[1].self_attn
    wanted = merged.o_proj.weight.T.reshape(4, 8, 32)
    torch.testing.assert_close(weights.W_O, wanted, rtol=1e-5, atol=1e-5)
    q = merged.q_proj.weight.reshape(4, 8, 32).transpose(1, 2)
    torch.testing.assert_close(weights.W_Q, q, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_head_weights_follow_the_adapter_that_is_active() -> None:
    model = adapted()
    hooked = hook(model)
    one = hooked.head_weights(0).W_V
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    disturbed(model).set_adapter("two")
    assert not torch.allclose(hooked.head_weights(0).W_V, one, atol=1e-3)
    check(hooked, 0, True)
    model.base_model.set_adapter(["default", "two"])
    check(hooked, 0, True)
    own = build("llama").model.layers[0].self_attn.v_proj.weight
    own = own.reshape(2, 8, 32).transpose(1, 2).repeat_interleave(2, 0)
    with model.disable_adapter():
        assert torch.equal(hooked.head_weights(0).W_V, own)


@torch.no_grad()
def test_an_adapted_model_is_edited_and_generates_as_its_merged_twin() -> None:
    model = adapted()
    twin = hook(copy.deepcopy(model).merge_and_unload())
    hooked = hook(model)
    assert {"position_ids", "use_cache", "past_key_values"} <= hooked.accepts
    assert hooked.accepts == twin.accepts and hooked.has_cache
    edit = interp.edits.Ablate(["L1H2"])
    for one in (hooked, twin):
        assert one.head_weights(0).W_Q.shape == (4, 32, 8)
    with hooked.edit(edit), twin.edit(edit):
        torch.testing.assert_close(hooked.logits(IDS), twin.logits(IDS), rtol=1e-4, atol=1e-4)
        made = [
            one.generate(input_ids=IDS, max_new_tokens=4, do_sample=False) for one in (hooked, twin)
        ]
    assert torch.equal(*made)


class Reading(LiveEdit):
    """Changes nothing, and keeps the prompt's tokens as calls have them."""

    needs_tokens = True

    def __init__(self, seen: list[Any]):
        self.seen = seen

    def apply(self, call: Any, z: torch.Tensor) -> torch.Tensor:
        self.seen.append(call.tokens)
        return z


@torch.no_grad()
def test_texts_of_the_prompt_are_found_under_peft_in_generate() -> None:
    """`generate` of a PEFT model calls the model inside, past its own forward."""
    model = adapted()
    hooked = hook(model)
    seen: list[Any] = []

    with hooked.edit(Reading(seen)):
        hooked.generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    assert all(tokens is not None for tokens in seen)
    assert seen[0].tolist() == IDS.tolist()


@pytest.mark.parametrize(
    "kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"]
)
def test_virtual_tokens_are_refused(kind: str) -> None:
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(TapError, match="virtual tokens"):
        hook(peft.get_peft_model(build("llama"), config))


@torch.no_grad()
@pytest.mark.parametrize("how", ["cpu", pytest.param("disk", marks=pytest.mark.slow)])
def test_offloaded_models_answer_as_they_do_in_memory(how: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = build("llama")
    want = hook(copy.deepcopy(plain))
    if how == "cpu":
        model = accelerate.cpu_offload(plain, execution_device="cpu")
    else:
        model = accelerate.disk_offload(plain, str(tmp_path), execution_device="cpu")
    hooked = hook(model)
    assert hooked.device == torch.device("cpu")
    with hooked.edit(interp.edits.Ablate(["L0H1"])), want.edit(interp.edits.Ablate(["L0H1"])):
        assert torch.equal(hooked.logits(IDS), want.logits(IDS))
    for layer in range(2):
        ours, theirs = hooked.head_weights(layer), want.head_weights(layer)
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(hooked.vocabulary().W_U, want.vocabulary().W_U)
    assert torch.equal(hooked.vocabulary().W_E, want.vocabulary().W_E)
    torch.testing.assert_close(
        hooked.norms().attention(1).gain,
        want.norms().attention(1).gain,  # type: ignore[union-attr]
    )


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped", "in place", "by layer"])
def test_compiled_models_are_tapped(how: str) -> None:
    """The caller's own compiled function is edited and seen too."""
    want = hook(build("llama"))
    model = compiled = build("llama")
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    own = compiled(input_ids=IDS).logits
    hooked = hook(compiled)
    edit = interp.edits.Ablate(["L0H1"])
    with want.edit(edit):
        wanted = want.logits(IDS)
    with hooked.edit(edit), hooked.observe("entropy") as seen, hooked.capture_resid() as resid:
        torch.testing.assert_close(hooked.logits(IDS), wanted)
        torch.testing.assert_close(compiled(input_ids=IDS).logits, wanted)
    assert seen[1].entropy.shape[-1] == 2 * IDS.shape[1]
    assert resid["post", 1].shape[1] == 2 * IDS.shape[1]
    torch.testing.assert_close(compiled(input_ids=IDS).logits, own)
    torch.testing.assert_close(hooked.logits(IDS), own)


@torch.no_grad()
def test_loading_leaves_every_flag_as_it_found_it() -> None:
    model = build("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    for parameter in model.model.layers[1].parameters():
        parameter.requires_grad_(False)

    def flags() -> Any:
        return (
            [(name, part.training) for name, part in model.named_modules()],
            [(name, p.requires_grad) for name, p in model.named_parameters()],
            model.config.to_dict(),
            model.config._attn_implementation,
            model.generation_config.to_dict(),
        )

    before = flags()
    hooked = hook(model)
    assert flags() == before
    with (
        pytest.raises(TapError, match=r"training mode with dropout .*model\.module\.eval"),
        hooked.observe("entropy"),
    ):
        hooked.logits(IDS)
    hooked.module.eval()
    with hooked.observe("entropy") as seen:
        hooked.logits(IDS)
    assert seen[1].entropy.shape == (1, 4, 7)


@torch.no_grad()
def test_dropout_beside_the_attention_is_seen_too() -> None:
    hooked = hook(build("gpt2", resid_pdrop=0.3))
    hooked.module.train()
    with pytest.raises(TapError, match=r"dropout \(transformer\.drop\)"), hooked.capture_z():
        hooked.logits(IDS)
    for part in hooked.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with hooked.capture_z() as z:  # training without chance is as good as evaluation
        hooked.logits(IDS)
    assert z[0].shape == (1, 7, 4, 8)
