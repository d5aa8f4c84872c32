"""Heads that a model lacks, in hybrids and in models whose layers differ, are refused by name with
the layers that have attention; layers are numbered as the model numbers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

import interp
from interp_hooks import Head, HookedModel, hook
from interp_hooks.errors import HeadError
from interp_hooks.heads import check_layer_head, layer_list, no_attention

IDS = torch.tensor([[5, 17, 3, 99, 42, 8, 61]])
EDITS = interp.edits


@pytest.fixture(scope="module")
def hybrid() -> HookedModel:
    """Attention in layers 1 and 3 of 4; the others are convolutions."""
    torch.manual_seed(0)
    config = hf.Lfm2Config(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    )  # fmt: skip
    return hook(hf.AutoModelForCausalLM.from_config(config).eval())


GHOSTS: dict[str, Callable[[], Any]] = {
    "ablate": lambda: EDITS.Ablate(["L1H0", "L2H3"]),
    "scale_heads": lambda: EDITS.ScaleHeads({"L2H1": 2.0}),
    "head_gate": lambda: EDITS.HeadGate(keep=1, layers=(1, 2)),
    "gate": lambda: EDITS.Gate({"L2H0": 0.5}),
    "gate, all layers": lambda: EDITS.Gate(
        torch.tensor([[1.0, 1.0], [0.5, 1.0], [0.5, 1.0], [1.0, 1.0]])
    ),
    "temperature": lambda: EDITS.Temperature(2.0, heads=["L2H0"]),
}


@pytest.mark.parametrize("name", GHOSTS)
def test_edits_of_heads_that_are_not_there_are_refused(hybrid: HookedModel, name: str) -> None:
    with (
        pytest.raises(HeadError, match="layer 2 has no attention; layers 1 and 3 have"),
        hybrid.edit(GHOSTS[name]()),
    ):
        pass


@torch.no_grad()
def test_heads_that_are_there_are_edited(hybrid: HookedModel) -> None:
    own = hybrid.logits(IDS)
    with hybrid.edit(EDITS.Ablate(["L1H0"])), hybrid.capture_z() as z:
        assert not torch.equal(hybrid.logits(IDS), own)
    assert sorted(z) == [1, 3]
    assert [str(h) for h in hybrid.heads[:5]] == ["L1H0", "L1H1", "L1H2", "L1H3", "L3H0"]


def test_layers_without_attention_have_no_head_weights(hybrid: HookedModel) -> None:
    assert hybrid.head_weights(3).W_Q.shape == (4, 32, 8)
    with pytest.raises(HeadError, match="layer 2 has no attention; layers 1 and 3 have"):
        hybrid.head_weights(2)
    with pytest.raises(HeadError, match="there is no attention layer 4; layers 1 and 3 have"):
        hybrid.head_weights(4)
    with pytest.raises(HeadError, match="no tower 'vision'"):
        hybrid.head_weights(1, tower="vision")


@torch.no_grad()
def test_the_stream_of_a_hybrid_has_every_block(hybrid: HookedModel) -> None:
    own = hybrid.logits(IDS)
    with hybrid.capture_resid() as resid, hybrid.block_outputs() as outputs:
        hybrid.logits(IDS)
    for layer in range(3):
        assert torch.equal(resid["post", layer], resid["pre", layer + 1])
        with hybrid.resume(layer + 1, outputs[layer]):
            assert torch.equal(hybrid.logits(IDS), own)


def test_layers_of_several_sizes() -> None:
    sizes = {0: 2, 1: 4}
    check_layer_head(Head(1, 3), sizes)
    with pytest.raises(HeadError, match=r"layer 0 has 2 heads \(0 to 1\)"):
        check_layer_head(Head(0, 3), sizes, "M")
    with pytest.raises(HeadError, match=r"has no head L5H0: it has 2 layers \(0 to 1\) of 4 heads"):
        check_layer_head(Head(5, 0), {0: 4, 1: 4}, "M")
    with pytest.raises(HeadError, match="there is no attention layer 7; there are 0 to 1"):
        check_layer_head(Head(7, 0), sizes, "M")


def test_how_layers_are_named() -> None:
    assert layer_list([2]) == "layer 2"
    assert layer_list([3, 1]) == "layers 1 and 3"
    assert layer_list(range(4, 9)) == "layers 4 to 8"
    assert layer_list([0, 4, 5, 6, 9]) == "layers 0, 4 to 6 and 9"
    assert no_attention(1, [0]) == "there is no attention layer 1; there are 0 to 0"
    assert no_attention(0, [3]) == "layer 0 has no attention; layer 3 has"
