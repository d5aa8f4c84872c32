"""Ships and Sahara against an eager model whose heads average the values of all keys they see."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import interp
from interp.errors import InputError
from interp.inputs import requests as kinds
from interp.inputs.tokenizer import Text
from interp.mechanics import sahara
from interp.mechanics.ablated_ends import AblatedEnds
from interp_hooks import Head, HookedModel

Worded = Callable[[str], tuple[HookedModel, Any]]
MODELS = ["llama", "gpt2"]
PAIRS = (
    ("the cat saw the dog", "the cat liked the dog"),
    ("the man took a book", "the girl took a book"),
    ("the old man found the boy .", "the old man liked the girl ."),
    ("the dog", "a book and the man"),
)


@pytest.fixture(autouse=True)
def small_english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests in the words that the tests' tokenizer knows."""
    monkeypatch.setattr(kinds, "REQUESTS", PAIRS)
    monkeypatch.setattr(Text, "natural", True)


@torch.no_grad()
def ends(plain: Any, ids: list[int], even: list[Head]) -> tuple[torch.Tensor, torch.Tensor]:
    """(vocabulary,) float64 log-probabilities and (d_model,) the normed state at the last token,
    some heads attending evenly: z of a row is the mean of the values up to it."""
    values: dict[int, torch.Tensor] = {}

    def evened(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(z: torch.Tensor) -> torch.Tensor:
            v, new = values[layer], z.clone()  # v (1, heads, keys, d_head)
            seen = torch.arange(1, v.shape[2] + 1, dtype=v.dtype)[:, None]
            for head in (h for h in even if h.layer == layer):
                new[0, :, head.head] = (v[0, head.head].cumsum(0) / seen).to(new)
            return new

        return change

    with ExitStack() as stack:
        for layer in range(2):
            stack.enter_context(tiny.reading_values(plain, layer, values))
            stack.enter_context(tiny.rewriting_z(plain, layer, evened(layer)))
        out = plain(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return out.logits[0, -1].double().log_softmax(-1), out.hidden_states[-1][0, -1].double()


def rows(model: HookedModel, side: int) -> list[list[int]]:
    text = Text(model.tokenizer)
    return [text.prompt(f"## Query: {pair[side]}\n## Answer:") for pair in PAIRS]


@pytest.mark.parametrize("name", MODELS)
def test_ships_is_the_divergence_of_even_attention(worded: Worded, name: str) -> None:
    model, plain = worded(name)
    atlas = interp.scan_heads(model, ["ships", "ships_excess"], 64, 4, 0, progress=False)
    wanted = np.zeros((2, 2, 4))
    for side in (0, 1):
        for ids in rows(model, side):
            before, _ = ends(plain, ids, [])
            for layer in range(2):
                for head in range(4):
                    after, _ = ends(plain, ids, [Head(layer, head)])
                    kl = float((before.exp() * (before - after)).sum())
                    wanted[side, layer, head] += kl / len(PAIRS)
    assert wanted.max() > 1e-3
    np.testing.assert_allclose(np.asarray(atlas["ships"], float), wanted[0], rtol=2e-3, atol=2e-5)
    excess = wanted[0] - wanted[1]
    np.testing.assert_allclose(np.asarray(atlas["ships_excess"], float), excess, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_sahara_turns_the_states_furthest_step_by_step(worded: Worded, name: str) -> None:
    model, plain = worded(name)
    ids = rows(model, 0)

    def first(even: list[Head]) -> np.ndarray:
        states = np.stack([ends(plain, row, even)[1].numpy() for row in ids])
        _, vectors = np.linalg.eigh(states @ states.T)  # left singular vectors, the strongest last
        return vectors[:, -1]

    before, group, heads = first([]), [], [Head(la, h) for la in range(2) for h in range(4)]
    found = sahara(model, [one for one, _ in PAIRS], k=2)
    for row in found.itertuples():
        angles = {
            h: float(np.degrees(np.arccos(min(1, abs(before @ first([*group, h]))))))
            for h in heads
            if h not in group
        }
        best = max(angles, key=lambda h: angles[h])
        assert row.head == str(best) and row.angle == pytest.approx(angles[best], rel=1e-2)
        assert row.next_angle <= row.angle
        group.append(best)


def test_an_end_begun_in_the_middle_is_a_whole_forward(worded: Worded) -> None:
    model, _ = worded("llama")
    begun, whole = (AblatedEnds(model, rows(model, 0)) for _ in range(2))
    assert begun._blocks
    whole._blocks = {}
    for heads in ([Head(1, 2)], [Head(1, 0), Head(0, 1)], []):
        torch.testing.assert_close(begun.log_probs(heads), whole.log_probs(heads))


def test_requests_are_pairs_of_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    flat = [request for pair in kinds.REQUESTS for request in pair]
    assert len(set(flat)) == len(flat) >= 60
    for one, other in kinds.REQUESTS:
        assert one.split()[0] == other.split()[0] and one[-1] == other[-1]
    assert kinds.requests(4, 1) == kinds.requests(4, 1) != kinds.requests(4, 2)


def test_what_can_t_be_asked_is_told(worded: Worded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = worded("llama")
    for wrong in (dict(rank=4), dict(rank=0), dict(k=0), dict(k=9), dict(k="x")):
        with pytest.raises(InputError):
            sahara(model, [one for one, _ in PAIRS], **wrong)
    with pytest.raises(InputError, match="list of texts"):
        sahara(model, "the cat")
    with pytest.raises(InputError, match="no prompt"):
        AblatedEnds(model, [])
    monkeypatch.setattr(Text, "natural", False)
    with pytest.raises(InputError, match="spells everyday English"):
        interp.scan_heads(model, "ships", samples=2)
