"""Truth test: circuits written into a model's weights by hand must be the ones the scan finds.

The model is a GPT-2 whose residual stream has four blocks of 128 coordinates:

    [ position | token | previous token | spare ]

Every code is a vector of ±1 with as many +1 as −1. So each vector in the stream has mean zero and
the same norm, and LayerNorm is nothing but multiplication by a constant, √(512 / filled
coordinates): √2 on entering layer 0 (two blocks filled), √(4/3) on entering layer 1 (three blocks).
Position codes are rows of a Hadamard matrix, exactly orthogonal; there are more tokens than
dimensions, so token codes are random and nearly orthogonal. MLPs add nothing.

* L0H1, previous token. Query: the code of position t − 1 (a linear map of the code of t); key: the
  position's own code.
  It copies the token code it finds into the block "previous token".
* L0H3, sink. Query: a constant (the bias); key: how much the position is position 0. It writes
  nothing.
* L1H2, induction. Query: the token's code; key: the block "previous token" that L0H1 filled. So it
  looks at what
  followed the last occurrence of the current token, and adds that token's code to the block
  "token", where the tied unembedding reads it.

All other heads have zero queries and keys (uniform attention) and zero values.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import interp
from interp.edits import Ablate
from interp_hooks import Head, HookedModel, hook

BLOCK, HEADS, LAYERS, POSITIONS = 128, 4, 2, 127
WIDTH = HEADS * BLOCK  # d_head = 128 as well
POSITION, TOKEN, PREVIOUS = (slice(i * BLOCK, (i + 1) * BLOCK) for i in range(3))
SHARPNESS = 40.0  # logit of a match, after the division by √d_head
PLANTED = {"previous_token": Head(0, 1), "sink": Head(0, 3), "induction": Head(1, 2)}
SCALE = [
    math.sqrt(2.0),
    math.sqrt(4.0 / 3.0),
]  # what LayerNorm multiplies by, on entering each layer


def hadamard(n: int) -> torch.Tensor:
    """(n, n) of ±1 with orthogonal rows; all rows but the first are balanced."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def balanced_codes(n: int, seed: int) -> torch.Tensor:
    """(n, BLOCK) random ±1 codes with mean zero."""
    half = torch.cat([torch.ones(BLOCK // 2), -torch.ones(BLOCK // 2)])
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([half[torch.randperm(BLOCK, generator=draw)] for _ in range(n)])


class Attention:
    """Writes the weights of single heads into a GPT-2 attention module (Conv1D: y = x W + b, q, k,
    v side by side)."""

    def __init__(self, module: Any):
        self.qkv, self.bias, self.out = (
            module.c_attn.weight,
            module.c_attn.bias,
            module.c_proj.weight,
        )

    def columns(self, which: int, head: int) -> slice:
        start = which * WIDTH + head * BLOCK
        return slice(start, start + BLOCK)

    def match(
        self, head: int, reads_q: slice, q_map: torch.Tensor, reads_k: slice, scale: float
    ) -> None:
        """Logit SHARPNESS where q_map(query's block) equals the key's block."""
        gain = SHARPNESS * math.sqrt(BLOCK) / (BLOCK * scale**2)
        self.qkv[reads_q, self.columns(0, head)] = q_map * gain
        self.qkv[reads_k, self.columns(1, head)] = torch.eye(BLOCK)

    def copy(self, head: int, reads: slice, writes: slice, gain: float, scale: float) -> None:
        """Value: a block; output: the same numbers times `gain` in another block, LayerNorm's
        factor taken out."""
        self.qkv[reads, self.columns(2, head)] = torch.eye(BLOCK)
        self.out[head * BLOCK : (head + 1) * BLOCK, writes] = torch.eye(BLOCK) * gain / scale


@torch.no_grad()
def planted(vocabulary: int) -> Any:
    """The model described above."""
    config = hf.GPT2Config(
        vocab_size=vocabulary,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=POSITIONS,
        n_inner=8,
    )
    model = hf.GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
    place = hadamard(BLOCK)[1:]  # 127 balanced codes
    model.transformer.wpe.weight[:, POSITION] = place
    model.transformer.wte.weight[:, TOKEN] = balanced_codes(vocabulary, 0)
    first, second = (Attention(block.attn) for block in model.transformer.h)

    # L0H1: p_t ↦ p_{t−1}; position 0 looks at itself
    one_back = place.T @ torch.cat([place[:1], place[:-1]]) / BLOCK
    first.match(1, POSITION, one_back, POSITION, SCALE[0])
    first.copy(1, TOKEN, PREVIOUS, 1.0, SCALE[0])

    # L0H3: a constant query, and a key that is large at position 0 alone
    first.bias[first.columns(0, 3)] = SHARPNESS / math.sqrt(BLOCK)
    first.qkv[POSITION, first.columns(1, 3)] = (
        place[0][:, None] / (BLOCK * SCALE[0]) @ torch.ones(1, BLOCK)
    )

    # L1H2: the current token's code against the previous token's code at each key
    second.match(2, TOKEN, torch.eye(BLOCK), PREVIOUS, SCALE[1])
    second.copy(2, TOKEN, TOKEN, 3.0, SCALE[1])
    return model


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> HookedModel:
    return hook(planted(len(tokenizer)), name="planted", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def atlas(model: HookedModel) -> interp.Atlas:
    names = [*PLANTED, "max_prob", "entropy", "value_drain"]
    return interp.scan_heads(model, scores=names, context=120, samples=6, progress=False)


@pytest.mark.parametrize("score", PLANTED)
def test_exactly_the_planted_head_is_named(atlas: interp.Atlas, score: str) -> None:
    values = np.asarray(atlas[score])
    assert values.shape == (LAYERS, HEADS)
    head = PLANTED[score]
    assert atlas.top(score, 1) == [head]
    assert values[head.layer, head.head] > 0.9
    others = np.delete(values.ravel(), head.layer * HEADS + head.head)
    assert others.max() < 0.2, dict(zip(range(len(others)), others.round(3), strict=True))


def test_unplanted_heads_are_uniform(atlas: interp.Atlas) -> None:
    """Entropy of uniform attention over 120 causal rows is the mean of ln(1), …, ln(120)."""
    uniform = np.log(np.arange(1, 121)).mean()
    for layer in range(LAYERS):
        for head in range(HEADS):
            if Head(layer, head) not in PLANTED.values():
                assert atlas["entropy"][layer, head] == pytest.approx(uniform, abs=1e-4)
    assert atlas["entropy"][0, 1] < 0.01 and atlas["entropy"][0, 3] < 0.01


def test_layer_norm_is_harmless_here(model: HookedModel) -> None:
    """The construction's own claim: zero mean and the same norm at every position, so LayerNorm
    only scales."""
    ids = torch.tensor([interp.tasks.get("induction").sample(model.tokenizer, 1, 0)[0].ids])
    with torch.no_grad(), model.capture_resid() as resid:
        model(input_ids=ids)
    for layer, filled in enumerate((2, 3)):
        stream = resid["pre", layer][0]
        assert float(stream.mean(-1).abs().max()) < 1e-5
        torch.testing.assert_close(
            stream.pow(2).sum(-1),
            torch.full((len(stream),), float(filled * BLOCK)),
            rtol=1e-4,
            atol=0,
        )


def test_the_circuit_does_its_work_and_ablation_shows_it(model: HookedModel) -> None:
    """The model repeats sequences; it stops without either half of the circuit, and does not miss
    the other heads."""
    n = 6
    assert interp.evaluate(model, "induction", n=n).baseline.mean > 0.99
    both = ["0.1", "1.2"]
    for needed in both:
        for mode in ("zero", "uniform"):
            assert (
                interp.evaluate(model, "induction", [Ablate(needed, mode)], n=n).edited.mean < 0.1
            ), (needed, mode)
    rest = [h for h in model.heads if h not in (Head(0, 1), Head(1, 2))]
    assert interp.evaluate(model, "induction", [Ablate(rest)], n=n).edited.mean > 0.99


def test_importance_and_random_control_agree(model: HookedModel) -> None:
    result = interp.ablate(model, "0.1,1.2", task="induction", n=4, seed=0)
    assert result.baseline.mean > 0.99 and result.ablated.mean < 0.1
    assert result.control is not None and result.control.mean > 0.99
    assert not set(result.control_heads) & set(result.heads)
