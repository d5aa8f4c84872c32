"""Gradient checkpointing under the tap: rows count once, gradients are of the edited function."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import tiny
import tiny_gated
import torch
from prompts import LENGTH, tokens
from torch.utils.checkpoint import checkpoint

from interp.edits import ScaleHeads, ZeroTuning
from interp_hooks import HookedModel, hook
from interp_hooks.errors import TapError

EDITS = {"gains": ScaleHeads({"0.1": 0.0, "1.2": 3.0}), "logits": ZeroTuning(3.0)}
INSIDE = ["inside", "after"]


def gradients(
    model: HookedModel,
    edits: list[Any],
    reentrant: bool | None,
    inside: bool,
    weights: bool = False,
) -> tuple[list[torch.Tensor], Any]:
    """(gradients of the loss by every weight, what was seen); reentrant None: no checkpointing."""
    module = model.module
    module.zero_grad()
    if reentrant is not None:
        how = dict(use_reentrant=reentrant)
        module.train()
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        module.enable_input_require_grads()
    with ExitStack() as stack:
        seen = stack.enter_context(model.observe("entropy", "received"))
        for edit in edits:
            stack.enter_context(model.edit(edit))
        out = model(input_ids=tokens(), labels=tokens(), use_cache=False, output_attentions=weights)
        loss = out.loss
        if inside:
            with model.edit(ScaleHeads({"0.3": 0.5})):  # it was not there when the loss was made
                loss.backward()
    if not inside:
        loss.backward()
    module.gradient_checkpointing_disable()
    if reentrant is not None:
        module.disable_input_require_grads()
    module.eval()
    grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return grads, seen


@pytest.mark.parametrize("when", INSIDE)
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_checkpointing_changes_nothing(name: str, edit: str, reentrant: bool, when: str) -> None:
    model = hook(tiny.build(name, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))
    for part in model.module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    chosen = model.module.config._attn_implementation
    wanted, once = gradients(model, [EDITS[edit]], None, True)
    found, seen = gradients(model, [EDITS[edit]], reentrant, when == "inside")
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    for layer in range(2):
        assert seen[layer].entropy.shape == (2, 4, LENGTH)
        torch.testing.assert_close(seen[layer].entropy, once[layer].entropy)
        torch.testing.assert_close(seen[layer].received, once[layer].received)
    assert model.observers_and_edits() == ([], [])
    assert model.module.config._attn_implementation == chosen


def test_weights_that_are_asked_for() -> None:
    model = hook(tiny.build("llama"))
    wanted, _ = gradients(model, [EDITS["gains"]], None, True)
    for reentrant in (False, True):
        found, _ = gradients(model, [EDITS["gains"]], reentrant, False, weights=True)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_several_forwards_and_one_backward_pass() -> None:
    """Each forward's layers run again under that forward's edits."""
    model = hook(tiny.build("llama"))

    def total(checkpointed: bool) -> torch.Tensor:
        module = model.module
        module.zero_grad()
        if checkpointed:
            module.train()
            module.gradient_checkpointing_enable()
        losses = []
        for edit in (EDITS["gains"], None, EDITS["logits"]):
            with model.edit(edit) if edit else nullcontext():
                losses.append(model(input_ids=tokens(), labels=tokens(), use_cache=False).loss)
        sum(losses).backward()
        module.gradient_checkpointing_disable()
        module.eval()
        return module.model.layers[0].self_attn.q_proj.weight.grad.clone()

    torch.testing.assert_close(total(True), total(False), atol=1e-5, rtol=1e-4)


def test_gated_heads() -> None:
    name, spec = next(iter(tiny_gated.GATED.items()))
    model = hook(tiny_gated.build(spec, name))
    edit = [ScaleHeads({f"{model.sites[0].layer}.1": 0.0})]
    wanted, _ = gradients(model, edit, None, True)
    for inside in (True, False):
        found, _ = gradients(model, edit, False, inside)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_a_checkpoint_of_ones_own(reentrant: bool) -> None:
    """Rows count once; an edit, which the second run would not have, is refused."""
    model = hook(tiny.build("llama"))
    layer = model.module.model.layers[0]
    own = layer.forward

    def forward(hidden: torch.Tensor, **more: Any) -> Any:
        return checkpoint(lambda x: own(x, **more), hidden, use_reentrant=reentrant)

    layer.forward = forward
    model.module.enable_input_require_grads()
    with model.observe("entropy") as seen:
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert seen[0].entropy.shape[-1] == LENGTH
    with pytest.raises(TapError, match="checkpoint"), model.edit(EDITS["gains"]):
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
