"""Sparse layouts against their definitions, key by key."""

from __future__ import annotations

import math
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
from interp_hooks.question import Question

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


def searched(
    q: np.ndarray, k: np.ndarray, n: int, keep: int, block: int, real: np.ndarray
) -> set[int]:
    """What one head's queries (rows, d) find among keys 0 … n − 1, in the docstring's words."""
    count = math.ceil(keep / block)
    if n <= count * block:
        return set(range(n))
    ranges = [(i * n // count, (i + 1) * n // count) for i in range(count)]
    for _ in range(math.ceil(math.log2(math.ceil(n / count) / block) - 1e-9)):
        halves = [(a, (a + b + 1) // 2) for a, b in ranges]
        halves += [((a + b + 1) // 2, b) for a, b in ranges]

        def score(one: tuple[int, int]) -> float:
            a, b = one
            at = min((a + b) // 2, n - 1)
            return -math.inf if a >= b or not real[at] else float((q @ k[at]).max())

        ranges = sorted(halves, key=score, reverse=True)[:count]
    return {i for a, b in ranges for i in range(a, b)}


@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("keep,block", [(6, 1), (8, 2), (5, 2)])
@torch.no_grad()
def test_hierarchical_topk(tapped: Tapped, name: str, keep: int, block: int, pads: int) -> None:
    model, _ = tapped(name)
    n = 37
    ids, mask = tokens(length=n), left_padded(True, n) if pads else None
    edit = HierarchicalTopk(keep, block_q=4, block_k=block, sink=2, recent=3)
    calls: list[Any] = []
    with model.edit(edit), model.watch(Question(call=True), calls.append, "before"):
        model.logits(ids, mask)
    theres = sees(model, edit, ids, mask)
    for stats in calls:
        call = stats.call
        q, k = call.query.double().numpy(), call.key.double().numpy()
        group = model.n_heads // model.n_kv_heads
        there = theres[call.site.layer]
        for b in range(len(ids)):
            real = np.ones(n, bool) if mask is None else mask[b].bool().numpy()
            first = int(real.argmax())
            for h in range(model.n_heads):
                for start in range(0, n, 4):
                    stop = min(start + 4, n)
                    found = searched(q[b, h, start:stop], k[b, h // group], stop, keep, block, real)
                    for t in range(max(start, first), stop):
                        near = {i for i in range(t + 1) if t - i < 3 or first <= i < first + 2}
                        wanted = {i for i in found | near if first <= i <= t}
                        assert set(np.flatnonzero(there[b, h, t])) == wanted


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
