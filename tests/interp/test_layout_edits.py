"""Sparse layouts against their definitions, key by key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from prompts import left_padded, tokens

import interp
from interp.edits import HierarchicalTopk, Sharded
from interp.errors import EditError
from interp_hooks import HookedModel

Tapped = Callable[[str], tuple[HookedModel, Any]]


def sees(model: HookedModel, edit: Any, ids: torch.Tensor, mask: Any = None) -> dict[int, Any]:
    """Layer → (batch, heads, queries, keys): which keys have weight under the edit."""
    found = {}
    with (
        model.edit(edit),
        model.observe("topk", topk=ids.shape[1], stage="after") as seen,
    ):
        model.logits(ids, mask)
    for layer in range(model.n_layers):
        index = seen[layer].topk_index
        there = torch.zeros(*index.shape[:3], ids.shape[1] + 1, dtype=torch.bool)
        there.scatter_(3, index.clamp_min(-1) % (ids.shape[1] + 1), True)
        found[layer] = there[..., :-1].numpy()
    return found


@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
@torch.no_grad()
def test_sharded(tapped: Tapped, name: str, pads: int) -> None:
    model, _ = tapped(name)
    ids, mask = tokens(length=23), left_padded(True, 23) if pads else None
    edit = Sharded(stride=2, local=3, block=4)
    for there in sees(model, edit, ids, mask).values():
        group = model.n_heads // model.n_kv_heads
        for b in range(len(ids)):
            first = pads if mask is not None and not mask[b, 0] else 0
            for h in range(model.n_heads):
                for t in range(first, 23):
                    wanted = {
                        i
                        for i in range(first, t + 1)
                        if t - i < 3 or ((i - first) // 4) % 2 == (h // group) % 2
                    }
                    assert set(np.flatnonzero(there[b, h, t])) == wanted
        together = there.any(1)[0, -1]
        assert together[pads if mask is not None and not mask[0, 0] else 0 :].all()


@torch.no_grad()
def test_sharded_decodes_as_it_reads(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    ids = tokens(length=20)
    edit = Sharded(stride=2, local=3, block=2, heads=[(1, 0), (1, 1)])
    with model.edit(edit):
        wanted = model.logits(ids)
        out = model(input_ids=ids[:, :12], use_cache=True)
        found = [out.logits]
        for i in range(12, 20):
            out = model(
                input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True
            )
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=2e-5, rtol=1e-4)


def test_sharded_must_cover_the_context(pocket: Any) -> None:
    with pytest.raises(EditError, match="seen by none"), pocket.edit(Sharded(stride=5)):
        pass
    for wrong in (dict(stride=1), dict(local=0), dict(block=0), dict(stride=2.5)):
        with pytest.raises(EditError):
            Sharded(**wrong)


@torch.no_grad()
def test_a_search_that_keeps_all_is_attention(pocket: Any) -> None:
    ids = torch.arange(20, 60)[None]
    with pocket.edit(HierarchicalTopk(keep=64)):
        torch.testing.assert_close(pocket.logits(ids), pocket.logits(ids))
    with pocket.edit(HierarchicalTopk(keep=8, block_q=1, recent=1)):
        moved = (pocket.logits(ids) - tiny.eager(pocket.module)(input_ids=ids).logits).abs().max()
    assert moved > 1e-3


def test_their_json(tmp_path: Any) -> None:
    edits = [Sharded(stride=2, heads=["L1H0"]), HierarchicalTopk(keep=64, scope="prefill")]
    interp.edits.save(tmp_path / "e.json", edits)
    assert interp.edits.load(tmp_path / "e.json") == edits


EDITS = {
    "shards": lambda heads: Sharded(stride=2, local=5, block=3, heads=heads),
    "search": lambda heads: HierarchicalTopk(6, 4, 2, 2, 5, heads=heads),
}


@pytest.mark.parametrize("heads", [None, [(0, 1), (1, 0), (1, 3)]])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss", "qwen3"])
@torch.no_grad()
def test_lists_of_keys_are_the_mask(
    tapped: Tapped, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, pads: bool, heads: Any
) -> None:
    """Where nobody asks for weights the keys are gathered; z is what the mask gives, and no mask
    of all queries and keys is made."""
    model, _ = tapped(name)
    length, prompt = 75, 70
    ids, real = tokens(length=length), left_padded(pads, length)
    edit = EDITS[kind](heads)

    def logits() -> list[torch.Tensor]:
        found = [model.logits(ids, real)]
        out = model(input_ids=ids[:, :prompt], attention_mask=real[:, :prompt], use_cache=True)
        for i in range(prompt, length):
            out = model(
                input_ids=ids[:, i : i + 1],
                attention_mask=real[:, : i + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            found.append(out.logits)
        return found

    with model.edit(edit), model.observe("max", stage="after"):
        wanted = logits()
    plain = model.logits(ids, real)
    calls = []

    def counted(self: Any, call: Any) -> Any:
        calls.append(call)
        return whole(self, call)

    whole = type(edit).seen
    monkeypatch.setattr(type(edit), "seen", counted)
    with model.edit(edit):
        found = logits()
    assert not calls
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=3e-5, rtol=1e-4)
    assert (found[0] - plain).abs().max() > 1e-3


@torch.no_grad()
def test_their_way_is_told(pocket: Any) -> None:
    with pocket.edit(HierarchicalTopk(keep=8, recent=2)):
        assert "the keys that blocks of queries list" in str(pocket.explain())


def test_gradients_take_the_mask(pocket: Any) -> None:
    ids = torch.arange(20, 60)[None]
    edit = Sharded(stride=2, local=5, block=3)
    with torch.no_grad(), pocket.edit(edit):
        wanted = pocket.logits(ids)
    with pocket.edit(edit), torch.enable_grad():
        found = pocket.module(input_ids=ids).logits
        assert found.grad_fn is not None
    torch.testing.assert_close(found.detach(), wanted, atol=2e-5, rtol=1e-4)
