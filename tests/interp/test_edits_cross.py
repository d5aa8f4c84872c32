"""Edits of cross-attention heads: z by hand from eager weights and values, put into the untouched
model before W_O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_cross_agreement import pair

from interp import edits as E
from interp.errors import EditError, HeadError
from interp_hooks import Head

Weights = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
DECODER = torch.tensor([[1, 5, 9, 4]])
HEADS = ["cross.L1H2"]


def scaled(gain: float, start: int, stop: int) -> Weights:
    def change(a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        a = a.clone()
        a[..., start:stop] *= gain
        return (a / a.sum(-1, keepdim=True)) @ v

    return change


def moved(a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Half of what keys 0 and 1 have goes to keys 4 to 6, in proportion."""
    a = a.clone()
    freed = 0.5 * a[..., :2].sum(-1, keepdim=True)
    a[..., :2] *= 0.5
    a[..., 4:7] *= 1 + freed / a[..., 4:7].sum(-1, keepdim=True)
    return a @ v


EDITS: dict[str, tuple[Any, Weights]] = {
    "scale_heads": (E.ScaleHeads({"cross.L1H2": 1.7}), lambda a, v: 1.7 * (a @ v)),
    "zero": (E.Ablate(HEADS), lambda a, v: 0 * (a @ v)),
    "uniform": (E.Ablate(HEADS, "uniform"), lambda a, v: (0 * a + 1 / a.shape[-1]) @ v),
    "scale_tokens": (E.ScaleTokens((1, 4), 3.0, heads=HEADS), scaled(3.0, 1, 4)),
    "initial": (E.ScaleTokens("initial", 0.2, heads=HEADS), scaled(0.2, 0, 1)),
    "move_mass": (E.MoveMass((0, 2), (4, 7), 0.5, heads=HEADS), moved),
    "temperature": (
        E.Temperature({"cross.L1H2": 0.5}),
        lambda a, v: torch.softmax(2 * a.log(), -1) @ v,
    ),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", ["whisper", "bart"])
@torch.no_grad()
def test_an_edit_of_one_cross_head_is_its_definition(kind: str, edit: str) -> None:
    model, plain, samples = pair(kind)
    given = dict(samples[0], decoder_input_ids=DECODER)
    value, change = EDITS[edit]
    attention = plain.get_decoder().layers[1].encoder_attn
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        attention.v_proj.register_forward_hook(lambda m, a, out: seen.update(v=out)),
        attention.out_proj.register_forward_pre_hook(lambda m, a: seen.update(z=a[0])),
    ]
    own = plain(**given, output_attentions=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    heads = seen["v"].unflatten(-1, (4, 8)).transpose(1, 2)  # (1, heads, keys, d)
    z = seen["z"].unflatten(-1, (4, 8)).clone()  # (1, queries, heads, d)
    weights = own.cross_attentions[1]
    torch.testing.assert_close((weights @ heads).transpose(1, 2), z, atol=1e-5, rtol=1e-4)
    z[:, :, 2] = change(weights[:, 2], heads[:, 2])
    swap = attention.out_proj.register_forward_pre_hook(lambda m, a: (z.flatten(2),))
    wanted = plain(**given, use_cache=False).logits
    swap.remove()
    with model.edit(value):
        found = model(**given, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)
    assert (found - own.logits).abs().max() > 1e-3
    assert "L1H2" in value.phrase and E.from_json(E.to_json([value])) == [value]


@torch.no_grad()
def test_self_attention_keeps_its_own_names() -> None:
    """L1H2 is the decoder's own head, cross.L1H2 the other; no heads means no cross heads."""
    model, _, samples = pair("bart")
    given = dict(samples[0], decoder_input_ids=DECODER)

    def zeroed(*heads: str) -> list[Any]:
        with model.edit(E.Ablate(list(heads) or None)), model.capture_z() as z:
            model(**given, use_cache=False)
        return [key for key, t in z.items() if not t.any(-1).any(1).all()]

    assert zeroed("L1H2") == [1] and zeroed("cross.L1H2") == [("cross", 1)]
    assert set(zeroed()) == {0, 1}
    assert model.check("cross.L1H2") == Head(1, 2, "cross")


def test_what_is_not_defined_there_is_refused(tokenizer: Any) -> None:
    model, _, samples = pair("bart")
    model.tokenizer = tokenizer
    text = E.ScaleTokens(E.Span("the cat"), 2.0, heads=HEADS)
    with pytest.raises(EditError, match="another input's"), model.edit(text):
        model(**samples[0], decoder_input_ids=DECODER)
    for edit, words in [
        (E.SoftPAG(1.0, HEADS), "another input's"),
        (E.Temperature({"cross.L1H2": 0.5}, rule="ssa"), "without a rule"),
        (E.Ablate(HEADS, "mean", reference="ioi"), "zero or uniform"),
        (E.Ablate(HEADS, "random"), "zero or uniform"),
        (E.ScaleHeads({"cross.L1H2": 2.0}, queries=(0, 2)), "leave queries= out"),
    ]:
        with pytest.raises(EditError, match=words), model.edit(edit):
            pass
    for head in ("cross.L2H0", "cross.L1H4"):
        with pytest.raises(HeadError), model.edit(E.Ablate([head])):
            pass
