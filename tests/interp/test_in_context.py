"""In-context against parametric heads: attributions by their definition, and problems that are what
they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import interp
from interp.errors import InputError
from interp.inputs.tokenizer import Text
from interp.scores.in_context import attributed, problems
from interp_hooks import HookedModel

Worded = Callable[[str], tuple[HookedModel, Any]]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attributions_are_output_times_gradient(worded: Worded, name: str) -> None:
    """Σ_t z_t·∂ log P(y)/∂z_t of each head, from hooks on the untouched model's own projections."""
    model, plain = worded(name)
    ids, answer = list(range(20, 33)), 40
    kept: list[torch.Tensor] = []

    def keep(module: Any, args: tuple) -> None:
        args[0].requires_grad_(True)
        args[0].retain_grad()
        kept.append(args[0])

    names = ("o_proj", "c_proj")
    parts = [
        m
        for path, m in plain.named_modules()
        if path.rsplit(".", 1)[-1] in names and "attn" in path.rsplit(".", 2)[-2]
    ]
    hooks = [m.register_forward_pre_hook(keep) for m in parts]
    try:
        with torch.enable_grad():
            logits = plain(input_ids=torch.tensor([ids])).logits[0, -1].double()
            logits.log_softmax(-1)[answer].backward()
    finally:
        for hook in hooks:
            hook.remove()
        plain.zero_grad()
    assert len(kept) == model.n_layers
    each = [(z * z.grad).double().view(len(ids), model.n_heads, -1).sum((0, 2)).abs() for z in kept]
    share = torch.stack(each) / torch.stack(each).sum()
    for head, found in attributed(model, ids, answer).items():
        assert found == pytest.approx(float(share[head.layer, head.head]), rel=1e-3, abs=1e-6)


def test_problems_ask_what_is_known_and_tell_another(pocket: Any) -> None:
    text, seen = Text(pocket.tokenizer), 0
    for closed, known, opened, told in problems(pocket, 0):
        assert known != told and told in opened and opened[-4:] == closed[-4:]
        assert len(opened) > 2 * (len(closed) - len(text.bos))
        seen += 1
    assert seen > 20
    assert [p[1] for p in problems(pocket, 0)] == [p[1] for p in problems(pocket, 0)]
    assert [p[1] for p in problems(pocket, 0)] != [p[1] for p in problems(pocket, 1)]


def test_a_model_that_knows_nothing_is_told(pocket: Any) -> None:
    with pytest.raises(InputError, match="both from memory and against it"):
        interp.scan_heads(pocket, "in_context", samples=4)
