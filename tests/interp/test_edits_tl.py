"""Edits of a TransformerLens model are those of the HuggingFace model with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from prompts import left_padded, tokens
from test_edits_models import EVERYWHERE, JOINED, PROMPT

from interp_hooks import HookedModel, hook
from interp_hooks.errors import EditError

pytest.importorskip("transformer_lens")

#: they need more than the weights
LOGITS = (
    "paint", "sigmoid_attention", "softplus", "head_gate", "gate", "gate after rules",
    "hierarchical_topk", "routed_heads", "routed_heads, straight", "seka",
)  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> tuple[HookedModel, HookedModel]:
    from prompts import hooked_transformer

    model: Any = tiny.build("llama", seed=1)
    return hook(model), hook(hooked_transformer(model))


@pytest.mark.parametrize("padding", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("kind", [*EVERYWHERE, *PROMPT, *JOINED])
def test_transformer_lens_under_the_same_edits(
    pair: tuple[HookedModel, HookedModel], kind: str, padding: bool
) -> None:
    edits = {**EVERYWHERE, **PROMPT, **JOINED}[kind]
    ids, mask = tokens(), left_padded(padding)
    model, lens = pair
    if kind in LOGITS:
        with torch.no_grad(), pytest.raises(EditError, match="TransformerLens"), lens.edit(*edits):
            lens.logits(ids, mask)
        return
    with torch.no_grad():
        with model.edit(*edits):
            wanted = model.logits(ids, mask, position_ids=tiny.positions(mask))
        with lens.edit(*edits):
            found = lens.logits(ids, mask)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=3e-4, rtol=3e-4)
